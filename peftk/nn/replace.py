"""What may stand in for an nn.Linear, and how it takes its place."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def replaceable(linear: nn.Module) -> None:
    """Raises TypeError unless `linear` computes what an nn.Linear computes, with a weight of its own."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
    if type(linear).forward is not nn.Linear.forward or "forward" in linear.__dict__:
        raise TypeError(f"linear: expected nn.Linear's own forward, got {type(linear).__name__} with another")
    if "weight" not in linear._parameters:
        raise TypeError("linear: expected a weight that is a Parameter, got one that is computed (weight_norm, …)")


def take_place(layer: Layer, linear: nn.Linear) -> Layer:
    """Gives `layer` the mode and the hooks of the linear that it replaces."""
    for hooks in _HOOKS:
        getattr(layer, hooks).update(getattr(linear, hooks))
    return layer.train(linear.training)
