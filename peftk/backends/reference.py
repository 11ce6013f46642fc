"""The reference in plain torch: runs every call on any device, among them those in fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from peftk.backends.contract import Backend
from peftk.launch.merge_args import NotFiniteError, write
from peftk.launch.segments import Segments
from peftk.quantized.formats import FORMATS
from peftk.reference.lora_linear import (
    lora_linear,
    lora_linear_backward,
    multi_lora_linear,
    multi_lora_linear_backward,
)
from peftk.reference.merge import RAW, Factors, checksum, merge, unmerge
from peftk.reference.receipt import MergeReceipt, code_as_bytes, pack_receipt
from peftk.reference.segments import segments as reference_segments

if TYPE_CHECKING:
    from peftk.backends.call import Call

__all__ = [
    "backend",
    "cannot_run",
    "checksum",
    "describe",
    "lora_linear",
    "lora_linear_backward",
    "merge",
    "merge_",
    "multi_lora_linear",
    "multi_lora_linear_backward",
    "remerge_",
    "segments",
    "unmerge",
    "unmerge_",
]


def backend() -> Backend:
    from peftk.backends import reference

    return Backend(reference, forward=reference, backward=reference, merge=reference, sort=reference, quantized=FORMATS)


def cannot_run(call: Call) -> str | None:
    return None


def describe(call: Call) -> str:
    return "plain torch: the specification, not built for speed"


def segments(ids: Tensor, adapters: int) -> Segments:
    return Segments(*reference_segments(ids, adapters))


def merge_(weight: Tensor, factors: Factors) -> MergeReceipt:
    """W' is computed in a new tensor; W is written last, so an exception leaves it unchanged."""
    return _merge_from(weight, weight, factors)


def unmerge_(weight: Tensor, receipt: MergeReceipt) -> None:
    write(weight, _base(weight, receipt))


def remerge_(weight: Tensor, receipt: MergeReceipt, factors: Factors) -> MergeReceipt:
    return _merge_from(weight, _base(weight, receipt), factors)


def _base(weight: Tensor, receipt: MergeReceipt) -> Tensor:
    code, raw_index = code_as_bytes(receipt)
    base = unmerge(weight, receipt.factors, code)
    base.view(-1)[raw_index] = receipt.raw_values
    return base


def _merge_from(weight: Tensor, base: Tensor, factors: Factors) -> MergeReceipt:
    new, code = merge(base, factors)
    if not bool(new.isfinite().all()):
        raise NotFiniteError
    receipt = pack_receipt(factors, code, base[code == RAW], checksum(new))
    write(weight, new)
    return receipt
