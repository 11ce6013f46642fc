"""Every operation in plain torch: the specification that kernels, tests and benchmarks are held against."""

from peftk.adapters.adapter import ALL, AdapterGrads, Wanted
from peftk.reference.lora_linear import (
    lora_linear,
    lora_linear_backward,
    multi_lora_linear,
    multi_lora_linear_backward,
    reads_z,
)
from peftk.reference.merge import checksum, merge, unmerge
from peftk.reference.segments import segments

__all__ = [
    "ALL",
    "AdapterGrads",
    "Wanted",
    "checksum",
    "lora_linear",
    "lora_linear_backward",
    "merge",
    "multi_lora_linear",
    "multi_lora_linear_backward",
    "reads_z",
    "segments",
    "unmerge",
]
