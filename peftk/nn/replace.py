"""Which modules are linears that a drop-in layer may stand in for, and how it takes their place."""

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
    """Whether it is transformers' Conv1D, a linear whose weight is stored [K, N]. The layer says so, no config."""
    if isinstance(module, FrozenLinear):
        return module.fan_in_fan_out
    return "transformers.pytorch_utils" in sys.modules and isinstance(module, conv1d())


def conv1d() -> type[nn.Module]:
    """transformers' Conv1D. Where transformers is not loaded, nobody has made one."""
    kind: type[nn.Module] = sys.modules["transformers.pytorch_utils"].Conv1D
    return kind


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, transformers' Conv1D, or a layer of ours that adds no parameter to them (BitFit's)."""
    if isinstance(module, FrozenLinear):
        return module.adds_nothing
    return isinstance(module, nn.Linear) or fan_in_fan_out(module)


def plain(linear: nn.Module) -> bool:
    """Whether a linear computes what its class computes: not a subclass with a forward of its own (quantised, …)."""
    if isinstance(linear, FrozenLinear):
        return True
    kind = conv1d() if fan_in_fan_out(linear) else nn.Linear
    return type(linear).forward is kind.forward and "forward" not in linear.__dict__


def replaceable(linear: nn.Module) -> nn.Linear:
    """The module as a linear, whose weight and bias a Conv1D has too.

    Raises TypeError unless it computes what a linear layer computes, with a weight of its own.
    """
    if not is_linear(linear):
        raise TypeError(f"linear: expected an nn.Linear or a Conv1D, got {type(linear).__name__}")
    if not plain(linear):
        name = "Conv1D" if fan_in_fan_out(linear) else "nn.Linear"
        raise TypeError(f"linear: expected {name}'s own forward, got {type(linear).__name__} with another")
    if "weight" not in linear._parameters:
        raise TypeError("linear: expected a weight that is a Parameter, got one that is computed (weight_norm, …)")
    return cast(nn.Linear, linear)


def take_place(layer: Layer, linear: nn.Module) -> Layer:
    """Gives `layer` the mode and the hooks of the linear that it replaces, and the adapters that hang on it."""
    layer._modules.update(linear._modules)
    for hooks in _HOOKS:
        getattr(layer, hooks).update(getattr(linear, hooks))
    layer._is_full_backward_hook = linear._is_full_backward_hook  # which torch asks before it runs backward hooks
    return layer.train(linear.training)
