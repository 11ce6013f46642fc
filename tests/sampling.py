"""Which of very many forms a run compiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def sampled(forms: Iterable[Sequence[Any]], every: int) -> list[Any]:
    """Parameters: one form of `every` in the full run, all others only where the whole matrix is asked for."""
    return [
        pytest.param(*form, marks=pytest.mark.matrix if number % every else pytest.mark.full)
        for number, form in enumerate(forms)
    ]
