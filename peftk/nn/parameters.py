"""Helpers for Parameters: reading them fast, an adapter's default dtype, and which optimizer holds one."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def param(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)` for a Parameter (or None), without the 0.5 µs of Module.__getattr__."""
    found = module._parameters.get(name, module)
    return getattr(module, name) if found is module else found  # not there: torch's parametrize or prune computes it


def default_adapter_dtype(weight: Tensor, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """An adapter's dtype. None means fp32, as in HF PEFT for 16-bit models, or fp64 for an fp64 weight."""
    if adapter_dtype is not None:
        return adapter_dtype
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def find_optimizer(
    modules: Iterable[nn.Module], names: Collection[str]
) -> tuple[nn.Module, torch.optim.Optimizer] | None:
    """A module with a Parameter of these names that an optimizer holds, and that optimizer; None if there is none.

    Only if something other than the modules refers to such a Parameter are all objects that Python's garbage collector
    knows searched for optimizers, which takes some 50 ms. An unreachable optimizer does not count.
    """
    shared = {
        id(module._parameters[name]): module
        for module in modules
        for name in names
        if sys.getrefcount(module._parameters[name]) > _REFCOUNT_OF_UNSHARED
    }
    if not shared or _find_optimizer(shared) is None:
        return None
    gc.collect()
    return _find_optimizer(shared)


_probe = nn.Linear(1, 1)
_REFCOUNT_OF_UNSHARED = sys.getrefcount(_probe._parameters["weight"])  # of a Parameter that only its module refers to


def _find_optimizer(modules: Mapping[int, nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer] | None:
    """The same, among `modules` by the id() of their Parameters."""
    for candidate in gc.get_objects():
        if issubclass(type(candidate), torch.optim.Optimizer):
            for group in getattr(candidate, "param_groups", ()):  # missing while it is being constructed
                for parameter in group["params"]:
                    if id(parameter) in modules:
                        return modules[id(parameter)], candidate
    return None
