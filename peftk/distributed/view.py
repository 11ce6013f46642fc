"""A layer seen over its local shards, so that its own forward computes this rank's part by the usual kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Module = TypeVar("Module", bound=nn.Module)
Replace = Callable[[Tensor, str], Tensor | None]  # a Parameter and its name in the layer → what the forward reads


def view(module: Module, replace: Replace, path: str = "") -> Module:
    """A module of the same class that shares everything with `module`, but reads other tensors for its Parameters.

    It is made anew for a call, so calls in several threads do not meet, and an exception leaves nothing behind.
    """
    seen = object.__new__(type(module))
    seen.__dict__.update(module.__dict__)
    seen.__dict__.pop("forward", None)
    seen.__dict__["_parameters"] = {
        name: None if tensor is None else replace(tensor, path + name) for name, tensor in module._parameters.items()
    }
    seen.__dict__["_modules"] = {
        name: view(child, replace, f"{path}{name}.") if child is not None and is_sharded(child) else child
        for name, child in module._modules.items()
    }
    return seen


def is_sharded(module: nn.Module) -> bool:
    """Whether any Parameter in the module is a DTensor."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
