"""Runs a function outside of compiled graphs. Import it lazily: torch's compiler takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def eagerly(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """function(*args, **kwargs), run in every call, between two compiled graphs."""
    return function(*args, **kwargs)
