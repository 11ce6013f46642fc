"""How a layer reads its own Parameters in every call, and of which dtype an adapter's are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def own(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)` for a Parameter (or None), without the half microsecond of Module.__getattr__."""
    found = module._parameters.get(name, module)
    return getattr(module, name) if found is module else found  # torch's parametrize and prune compute some of them


def dtype_beside(weight: Tensor, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """Of an adapter beside `weight`; for None fp32, as HF PEFT trains adapters of 16-bit models, fp64 beside fp64."""
    if adapter_dtype is not None:
        return adapter_dtype
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
