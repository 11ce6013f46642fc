"""What a choice between backends depends on, and what it is."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Call(NamedTuple):
    """What a choice depends on: nothing about a call's values, everything about its form."""

    op: str  # one of `peftk.explanation.OPS`
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


class BackendError(RuntimeError):
    """A backend was forced, by argument or by PEFTK_BACKEND, and cannot serve the call."""


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
