"""What a compiled graph can't hold. Only what is compiled imports it: torch's compiler takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def eagerly(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """function(*args, **kwargs) between two graphs, in every call."""
    return function(*args, **kwargs)
