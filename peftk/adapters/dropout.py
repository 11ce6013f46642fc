"""Dropout of an adapter's input: the object that travels whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftk.adapters import checks


class Dropout(NamedTuple):
    """x̃ = mask ⊙ x / (1 - p): which elements of x the adapter does not see. None in its place: it sees them all."""

    p: float  # 0 < p < 1
    seed: Tensor  # int64, one element, on x's device; the mask comes from it (`peftk.reference.philox`)


def dropout_of(p: float, seed: Tensor | None, device: torch.device) -> Dropout | None:
    """Dropout with a probability and a seed as users give them, where None draws one from torch's generator.

    Raises TypeError or ValueError where p is no probability below 1, or seed no int64 tensor of one element there.
    """
    if p == 0.0 and seed is None:
        return None
    checks.dropout(p, seed, device)
    if p == 0.0:
        return None
    return Dropout(p, torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device) if seed is None else seed)


def flat_dropout(dropout: Dropout | None) -> tuple[float, Tensor | None]:
    """p and seed, as torch's custom ops and kernels take them: p = 0 where nothing is dropped."""
    return (0.0, None) if dropout is None else dropout


def dropout_from(p: float, seed: Tensor | None) -> Dropout | None:
    """What `flat_dropout` made flat."""
    return None if seed is None else Dropout(p, seed)
