"""Plain torch on any device: the specification itself, and what serves fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftk.reference import (
    inspect,
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
    "describe",
    "inspect",
    "lora_linear",
    "lora_linear_backward",
    "merge",
    "multi_lora_linear",
    "multi_lora_linear_backward",
    "unmerge",
]


def cannot_serve(call: Call) -> str | None:
    return None


def describe(call: Call) -> str:
    return "plain torch: the specification, not built for speed"
