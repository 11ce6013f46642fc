"""Dropout of an adapter's input: its probability and seed."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peftk.adapters import checks


class Dropout(NamedTuple):
    """The adapter's input is x̃ = mask ⊙ x / (1 - p). Functions that take `Dropout | None` take None for no dropout."""

    p: float  # 0 < p < 1
    seed: Tensor  # int64, one element, on x's device; the mask comes from it (`peftk.reference.philox`)


_agreed: contextvars.ContextVar[Callable[[Tensor], Tensor] | None] = contextvars.ContextVar("peftk_seed", default=None)


@contextlib.contextmanager
def seeds_agreed(agree: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the `with`, seeds drawn in this thread pass through `agree`: ranks that share an x share its mask."""
    token = _agreed.set(agree)
    try:
        yield
    finally:
        _agreed.reset(token)


def dropout_of(p: float, seed: Tensor | None, device: torch.device) -> Dropout | None:
    """The Dropout for a probability and a seed from a user; seed None draws one from torch's generator. None for p = 0.

    Raises TypeError or ValueError unless 0 ≤ p < 1 and seed is None or an int64 tensor of one element on `device`.
    """
    if p == 0.0 and seed is None:
        return None
    checks.dropout(p, seed, device)
    if p == 0.0:
        return None
    return Dropout(p, _drawn(device) if seed is None else seed)


def _drawn(device: torch.device) -> Tensor:
    seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    agree = None if torch.compiler.is_compiling() else _agreed.get()
    return seed if agree is None else agree(seed)


def flat_dropout(dropout: Dropout | None) -> tuple[float, Tensor | None]:
    """p and seed, as custom ops and kernels take them; p = 0 for no dropout."""
    return (0.0, None) if dropout is None else dropout


def dropout_from(p: float, seed: Tensor | None) -> Dropout | None:
    """The inverse of `flat_dropout`."""
    return None if seed is None else Dropout(p, seed)
