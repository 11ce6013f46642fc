"""How a layer reads its own Parameters in every call, and of which dtype an adapter's are."""

from __future__ import annotations

import gc
from collections.abc import Collection
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


def optimized(parameters: Collection[nn.Parameter]) -> tuple[nn.Parameter, torch.optim.Optimizer] | None:
    """One of them that an optimizer holds, and the optimizer; None where none does.

    Python's garbage collector knows all objects, so this takes some 50 ms: for what is rarely done. An optimizer that
    nobody can reach any more doesn't count.
    """
    if not parameters:
        return None
    found = _optimized(parameters)
    if found is not None:
        del found
        gc.collect()
        found = _optimized(parameters)
    return found


def _optimized(parameters: Collection[nn.Parameter]) -> tuple[nn.Parameter, torch.optim.Optimizer] | None:
    wanted = {id(parameter): parameter for parameter in parameters}
    for one in gc.get_objects():
        if issubclass(type(one), torch.optim.Optimizer):
            for group in getattr(one, "param_groups", ()):  # one that is being made has none yet
                for parameter in group["params"]:
                    if id(parameter) in wanted:
                        return wanted[id(parameter)], one
    return None
