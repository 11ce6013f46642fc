"""Finds out whether another module computes with a layer's weight instead of calling the layer.

nn.MultiheadAttention, WavLM, Mamba and other fused forwards compute with `layer.weight`. An adapter of that layer does
nothing there, and merging it changes what the model computes. Our layers read their own weight without the attribute,
so a read of `layer.weight` comes from another module. It gets an alias, a tensor subclass that notices when something
is computed with it. Calls of the layer cost no more, and after `ALIASES` reads no more aliases are handed out, since
some models only look: T5 reads the dtype in every forward.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ALIASES = 32  # how many a layer hands out
_KEY = "_peftk_watch"
_PLAIN = (Tensor, nn.Parameter)  # exact types: subclasses are not aliased


@dataclasses.dataclass
class _Watch:
    """The state of one watched layer.

    name: the layer's name in the model. reader: the class of a module that computes with the layer's weight.
    """

    name: str
    reader: str | None = None
    aliases: int = ALIASES  # how many may still be handed out

    def record_reader(self, reader: str) -> None:
        if self.reader is None:
            self.reader = reader
            warnings.warn(
                f"peftk: {reader} computes with the weight of {self.name} itself instead of calling the layer; an "
                "adapter of that layer does nothing there and cannot be merged, so leave the layer out",
                stacklevel=3,
            )


def watch(layer: nn.Module, name: str, reader: str | None = None) -> None:
    """Starts to watch a layer: at the first reader of its weight there is a warning, and `reader_of` returns its class.

    reader: the class of a reader that is already known; the warning comes at once then.
    """
    layer.__dict__[_KEY] = _Watch(name)
    if reader is not None:
        layer.__dict__[_KEY].record_reader(reader)


def is_watched(layer: nn.Module) -> bool:
    return _KEY in layer.__dict__


def reader_of(layer: nn.Module) -> str | None:
    """The class of a module that was seen to compute with the layer's weight; None if there was none."""
    state: _Watch | None = layer.__dict__.get(_KEY)
    return None if state is None else state.reader


def check_mergeable(layer: nn.Module) -> None:
    """Raises ValueError if merging the layer would change what another module computes with its weight."""
    reader = reader_of(layer)
    if reader is not None:
        raise ValueError(f"weight: expected one that only its layer computes with, got one that {reader} reads too")


def weight_or_alias(layer: nn.Module, weight: Any) -> Any:
    """The value of `layer.weight`: the weight, or an alias of it if the forward of another module is running."""
    if torch.compiler.is_compiling() or type(weight) not in _PLAIN:
        return weight
    state: _Watch | None = layer.__dict__.get(_KEY)
    if state is None or state.aliases == 0 or state.reader is not None or torch._C._are_functorch_transforms_active():
        return weight
    asking = next(modules_in_forward(), layer)
    if asking is layer:
        return weight
    state.aliases -= 1
    alias: Any = _alias([(state, type(asking).__name__)], weight)
    alias._is_param = isinstance(weight, nn.Parameter)  # makes isinstance(alias, nn.Parameter) say the same
    return alias


class WatchedWeight(Tensor):
    """An alias of one or several layers' weights, or a tensor made from aliases alone: a view, a cast, a copy.

    An operation on an alias and any other tensor counts as computing with the weight. 0-d tensors count as numbers, not
    as tensors: adding a weight's norm to a loss is not computing with the weight.
    """

    _origins: list[tuple[_Watch, str]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            inputs = [tensor for tensor in tensors([*args, *kwargs.values()]) if tensor.dim() > 0]
            result = func(*args, **kwargs)
            computes = result is None or any(tensor.dim() > 0 for tensor in tensors(result))  # x[…] = weight gives None
        origins = [origin for tensor in inputs if isinstance(tensor, cls) for origin in tensor._origins]
        if computes and any(not isinstance(tensor, cls) for tensor in inputs):
            for state, reader in origins:
                state.record_reader(reader)
        elif computes and type(result) in _PLAIN:
            return _alias(origins, result)
        return result


def _alias(origins: list[tuple[_Watch, str]], tensor: Tensor) -> WatchedWeight:
    alias = tensor.as_subclass(WatchedWeight)
    alias._origins = origins
    return alias


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def modules_in_forward() -> Iterator[nn.Module]:
    """The modules whose forward is running in this thread, the innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, nn.Module):
                yield first
        frame = frame.f_back
