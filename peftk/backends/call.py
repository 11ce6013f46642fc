"""Describes a call (`Call`) and the choice of its backend (`Choice`)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from peftk.quantized.weight import QuantizedWeight

Kind = Literal["lora_linear", "adapter_block", "merge", "unmerge", "segments"]


class Op(NamedTuple):
    """An operation. many: each row may use a different adapter."""

    kind: Kind
    many: bool = False
    backward: bool = False

    def __str__(self) -> str:
        """Its name, for example multi_lora_linear_backward."""
        return f"{'multi_' if self.many else ''}{self.kind}{'_backward' if self.backward else ''}"

    @classmethod
    def parse(cls, name: str) -> Op:
        """The operation with this name. Raises ValueError for an unknown name."""
        op = _BY_NAME.get(name)
        if op is None:
            raise ValueError(f"op: expected one of {', '.join(_BY_NAME)}, got {name!r}")
        return op


LORA_LINEAR = Op("lora_linear")
MERGE, UNMERGE, SEGMENTS = Op("merge"), Op("unmerge"), Op("segments")
OPS = (
    Op("lora_linear"),
    Op("lora_linear", backward=True),
    Op("lora_linear", many=True),
    Op("lora_linear", many=True, backward=True),
    Op("adapter_block"),
    Op("adapter_block", backward=True),
    Op("adapter_block", many=True),
    Op("adapter_block", many=True, backward=True),
    MERGE,
    UNMERGE,
    SEGMENTS,
)
_BY_NAME = {str(op): op for op in OPS}


class Packing(NamedTuple):
    """The form of a quantized W (`peftk.quantized`): its format, and how many elements of a row share a scale."""

    format: str
    group: int

    @classmethod
    def of(cls, weight: Tensor | None) -> Packing | None:
        """None for a weight that is not quantized."""
        return cls(weight.format, weight.block[1]) if isinstance(weight, QuantizedWeight) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What the choice of a backend depends on: shapes, dtypes and device of a call, but no values."""

    op: Op
    device: str  # torch device type
    x_dtype: torch.dtype
    weight_dtype: torch.dtype
    adapter_dtype: torch.dtype | None
    M: int
    K: int
    N: int
    rank: int  # the largest of the adapters
    adapters: int
    dropout: bool = False
    slices: int = 1  # of packed outputs
    aligned: bool = True  # W's rows are contiguous and start at multiples of 16 bytes
    packing: Packing | None = None  # of a quantized W


def are_rows_aligned(strides: tuple[int, ...], itemsize: int, *, starts_on_16: bool) -> bool:
    """`Call.aligned` of a W with these strides, which starts at a multiple of 16 bytes or not."""
    across, along = strides
    return starts_on_16 and along == 1 and across * itemsize % 16 == 0


# Used in every call: a cached Call costs a tenth of a new one.
call_of = cast(type[Call], functools.lru_cache(maxsize=4096)(Call))


class BackendError(RuntimeError):
    """A backend cannot be imported, or was forced (by argument or PEFTK_BACKEND) and cannot run the call."""


class Choice(NamedTuple):
    """Which backend runs a call, and why; `str()` gives the lines that `peftk.explain` prints."""

    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...]  # (backend, why not), in the order they were tried
    kernel: str = ""  # the backend's description: kernels, launches, SIMD level
    unmeasured: bool = False  # the call will first measure whether another backend is faster

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        lines += [f"  {self.kernel}"] if self.kernel else []
        lines += [f"  not {name}: {why}" for name, why in self.rejected]
        return "\n".join(lines)
