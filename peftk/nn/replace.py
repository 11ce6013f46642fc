"""Which modules a drop-in layer may replace, and how it takes over their hooks and mode."""

from __future__ import annotations

import sys
from typing import TypeVar, cast

from torch import nn

from peftk.nn.frozen_linear import FrozenLinear

Layer = TypeVar("Layer", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def fan_in_fan_out(module: nn.Module) -> bool:
    """Whether the weight is stored [K, N], as in transformers' Conv1D. Read from the module, not from a config."""
    if isinstance(module, FrozenLinear):
        return module.fan_in_fan_out
    return "transformers.pytorch_utils" in sys.modules and isinstance(module, conv1d())


def conv1d() -> type[nn.Module]:
    """transformers' Conv1D. Raises KeyError if transformers is not imported; then there is no such module either."""
    kind: type[nn.Module] = sys.modules["transformers.pytorch_utils"].Conv1D
    return kind


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, a transformers Conv1D, or a layer of ours that adds no Parameters (BitFit's)."""
    if isinstance(module, FrozenLinear):
        return module.adds_nothing
    return isinstance(module, nn.Linear) or fan_in_fan_out(module)


def plain(linear: nn.Module) -> bool:
    """Whether a linear has the forward of nn.Linear or Conv1D, not one of its own (quantised layers, …)."""
    if isinstance(linear, FrozenLinear):
        return True
    kind = conv1d() if fan_in_fan_out(linear) else nn.Linear
    return type(linear).forward is kind.forward and "forward" not in linear.__dict__


def as_linear(linear: nn.Module) -> nn.Linear:
    """The module, typed as nn.Linear: weight and bias are there in a Conv1D too.

    Raises TypeError unless it computes what a linear layer computes, with a weight that is a Parameter.
    """
    if not is_linear(linear):
        raise TypeError(f"linear: expected an nn.Linear or a Conv1D, got {type(linear).__name__}")
    if not plain(linear):
        name = "Conv1D" if fan_in_fan_out(linear) else "nn.Linear"
        raise TypeError(f"linear: expected {name}'s own forward, got {type(linear).__name__} with a different one")
    if "weight" not in linear._parameters:
        raise TypeError("linear: expected a weight that is a Parameter, got one that is computed (weight_norm, …)")
    return cast(nn.Linear, linear)


def take_place(layer: Layer, linear: nn.Module) -> Layer:
    """Gives `layer` the mode, the hooks and the attached adapters of the linear that it replaces, and returns it."""
    layer._modules.update(linear._modules)
    for hooks in _HOOKS:
        getattr(layer, hooks).update(getattr(linear, hooks))
    layer._is_full_backward_hook = linear._is_full_backward_hook  # torch reads it before it runs backward hooks
    return layer.train(linear.training)
