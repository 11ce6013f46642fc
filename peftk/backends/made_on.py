"""What a measurement belongs to: the machine, the versions, the operation and dtype; and from which gain it counts."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, NamedTuple

import torch

from peftk.system.processor import cpu_name
from peftk.system.version import __version__

if TYPE_CHECKING:
    from peftk.backends.call import Op


class Verdict(NamedTuple):
    """Whether to prefer `gemm` to our own kernels, and why. unmeasured: the first call of its class measures both."""

    gemm: bool
    reason: str
    unmeasured: bool = False


def machine(device: str) -> str:
    """The name of the processor or GPU."""
    return f"{platform.machine()} {cpu_name()}" if device == "cpu" else torch.cuda.get_device_name()


def versions(device: str) -> dict[str, str]:
    """What a measurement is valid for."""
    made_with = {"torch": torch.__version__, "peftk": __version__}
    if device != "cpu":
        return {**made_with, "triton": importlib.metadata.version("triton")}
    from peftk import _cpu

    return {**made_with, "simd_level": _cpu.simd_level()}


def key_of(op: Op, dtype: torch.dtype, device: str) -> str:
    """The operation and dtype. On a CPU one adapter and many are measured together; on a GPU their tiles differ."""
    return f"{op._replace(many=op.many and device != 'cpu')} {str(dtype).removeprefix('torch.')}"


def margin(key: str) -> float:
    """The gain from which `gemm` is preferred. Higher in 16 bits, where it costs a second rounding."""
    return 1.05 if key.endswith("float32") else 1.15


def verdict_of(key: str, gain: float, where: str) -> Verdict:
    """where: at what the gain was measured."""
    reason = f"{where}: torch's GEMM is {gain:.2f} times as fast, wanted {margin(key):g} or more"
    return Verdict(gain >= margin(key), reason)
