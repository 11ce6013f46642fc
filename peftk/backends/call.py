"""What a choice between backends depends on, and what it is."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple, cast

import torch

Kind = Literal["lora_linear", "adapter_block", "merge", "unmerge", "segments"]


class Op(NamedTuple):
    """An operation. many: another adapter for every row."""

    kind: Kind
    many: bool = False
    backward: bool = False

    def __str__(self) -> str:
        """Its name: multi_lora_linear_backward, say."""
        return f"{'multi_' if self.many else ''}{self.kind}{'_backward' if self.backward else ''}"

    @classmethod
    def parse(cls, name: str) -> Op:
        """The operation of a name. Raises ValueError for a name that none has."""
        found = _BY_NAME.get(name)
        if found is None:
            raise ValueError(f"op: expected one of {', '.join(_BY_NAME)}, got {name!r}")
        return found


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What a choice depends on: nothing about a call's values, everything about its form."""

    op: Op
    device: str  # torch device type
    x_dtype: torch.dtype
    weight_dtype: torch.dtype
    adapter_dtype: torch.dtype | None
    M: int
    K: int
    N: int
    rank: int  # the largest in the batch
    adapters: int
    dropout: bool = False
    slices: int = 1  # of packed outputs
    aligned: bool = True  # W's rows are contiguous and start at multiples of 16 bytes


# For every call: the same Call for the same form, which takes a tenth of the time that making one takes.
call_of = cast(type[Call], functools.lru_cache(maxsize=4096)(Call))


class BackendError(RuntimeError):
    """A backend was forced, by argument or by PEFTK_BACKEND, and cannot run the call."""


class Choice(NamedTuple):
    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...]  # (backend, why not), in the order they were asked
    kernel: str = ""  # what the backend says of itself: kernels, launches, SIMD level

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        lines += [f"  {self.kernel}"] if self.kernel else []
        lines += [f"  not {name}: {why}" for name, why in self.rejected]
        return "\n".join(lines)
