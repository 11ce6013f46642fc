"""The one place that decides which backend runs. Every backend module has the reference's functions and signatures.

`reference` (plain torch, any device) · `cpu` (C++ SIMD) · `triton` (GPUs; CPU tensors under TRITON_INTERPRET=1) ·
`cuda` (CUDA C++, where it wins). A module also has `cannot_serve(call)`, the reason why it cannot or None, and
`describe(call)`, one line for `peftk.explain` about the kernel that would run. `choose` is a pure function of the
call; `explain` says what it chose and why.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch

NAMES = ("reference", "cpu", "triton", "cuda")

# First that can serve wins. The reference can serve everything, so a choice always exists.
_PREFERENCE = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}


# Calls of up to so many multiply-adds (M·N·K) on a CPU are about overhead: no measurement is asked, `cpu` serves them.
SMALL = 1 << 22


class Call(NamedTuple):
    """What a choice depends on: nothing about a call's values, everything about its form."""

    op: str  # lora_linear, multi_lora_linear, their _backward, merge, unmerge
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


@functools.cache
def module(name: str) -> ModuleType:
    """The backend's module. Raises BackendError with the reason where it cannot be imported here."""
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    try:
        return importlib.import_module(f"peftk.backends.{name}")
    except ImportError as error:
        raise BackendError(f"backend {name!r} cannot be imported: {error}") from error


def choose(call: Call, forced: str | None = None) -> Choice:
    """The backend that serves `call`. `forced` (else PEFTK_BACKEND) names one; it serves or BackendError is raised."""
    return _choose(call, forced or os.environ.get("PEFTK_BACKEND") or None)


@functools.lru_cache(maxsize=4096)
def _choose(call: Call, forced: str | None) -> Choice:
    if forced is not None:
        reason = cannot_serve(forced, call)
        if reason is not None:
            raise BackendError(f"backend {forced!r} was forced and cannot serve {call.op}: {reason}")
        return Choice(forced, "forced by argument or PEFTK_BACKEND", ())
    rejected: list[tuple[str, str]] = []
    for name in _PREFERENCE.get(call.device, ("triton", "reference")):
        reason = cannot_serve(name, call)
        if reason is None:
            return Choice(name, f"first in preference on {call.device} that serves this call", tuple(rejected))
        rejected.append((name, reason))
    raise BackendError(f"no backend serves {call}: {rejected}")


def cannot_serve(name: str, call: Call) -> str | None:
    """Why backend `name` cannot serve `call`, or None where it can."""
    try:
        backend = module(name)
    except BackendError as error:
        return str(error)
    return backend.cannot_serve(call)
