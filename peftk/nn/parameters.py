"""How a layer reads its own Parameters in every call."""

from __future__ import annotations

from typing import Any

from torch import nn


def own(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)` for a Parameter (or None), without the half microsecond of Module.__getattr__."""
    found = module._parameters.get(name, module)
    return getattr(module, name) if found is module else found  # torch's parametrize and prune compute some of them
