"""Plain torch on any device: the specification itself, and what serves fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from peftk import reference
from peftk.backends.merge_args import OutOfPlace
from peftk.backends.segments import Segments
from peftk.reference import (
    checksum,
    lora_linear,
    lora_linear_backward,
    merge,
    multi_lora_linear,
    multi_lora_linear_backward,
    unmerge,
)

if TYPE_CHECKING:
    from peftk.backends import Call

__all__ = [
    "cannot_serve",
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

_in_place = OutOfPlace(merge, unmerge, checksum)
merge_, unmerge_, remerge_ = _in_place.merge_, _in_place.unmerge_, _in_place.remerge_


def cannot_serve(call: Call) -> str | None:
    return None


def describe(call: Call) -> str:
    return "plain torch: the specification, not built for speed"


def segments(ids: Tensor, adapters: int) -> Segments:
    return Segments(*reference.segments(ids, adapters))
