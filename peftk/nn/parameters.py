"""How a layer reads its own Parameters in every call, and of which dtype an adapter's are."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterable, Mapping
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


def optimized(modules: Iterable[nn.Module], names: Collection[str]) -> tuple[nn.Module, torch.optim.Optimizer] | None:
    """A module of which an optimizer holds one of the Parameters of these names, and that; None where none does.

    Where anybody but the modules holds them, Python's garbage collector, which knows all objects, is asked for
    optimizers: some 50 ms. One that nobody can reach any more doesn't count.
    """
    shared = {
        id(module._parameters[name]): module
        for module in modules
        for name in names
        if sys.getrefcount(module._parameters[name]) > _ALONE
    }
    if not shared or _optimized(shared) is None:
        return None
    gc.collect()
    return _optimized(shared)


_probe = nn.Linear(1, 1)
_ALONE = sys.getrefcount(_probe._parameters["weight"])  # of a Parameter that its module alone holds


def _optimized(held: Mapping[int, nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer] | None:
    for one in gc.get_objects():
        if issubclass(type(one), torch.optim.Optimizer):
            for group in getattr(one, "param_groups", ()):  # one that is being made has none yet
                for parameter in group["params"]:
                    if id(parameter) in held:
                        return held[id(parameter)], one
    return None
