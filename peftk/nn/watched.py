"""The weight of a layer that a model asks for in the middle of its forward: is it to look at, or to compute with?

nn.MultiheadAttention, WavLM, Mamba and other fused forwards compute with `layer.weight` instead of calling the layer.
An adapter does nothing there, and merging it changes what the model computes. Our layers know their own weight without
asking for the attribute, so whoever asks is another module, and gets an alias of it that notices what becomes of it.
That costs calls of the layer nothing, and ends after some asking: T5 asks for the dtype in every forward.
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

ALIASES = 32  # that a layer gives away
_KEY = "_peftk_watch"
_PLAIN = (Tensor, nn.Parameter)  # exactly: what a subclass computes is its own affair


@dataclasses.dataclass
class _Watch:
    """Of one layer. name: in the model; reader: the class of the module that computes with the layer's weight."""

    name: str
    reader: str | None = None
    left: int = ALIASES

    def found(self, reader: str) -> None:
        if self.reader is None:
            self.reader = reader
            warnings.warn(
                f"peftk: {reader} computes with the weight of {self.name} itself, where an adapter of that layer does "
                "nothing; it cannot be merged, and is best left out",
                stacklevel=3,
            )


def watch(layer: nn.Module, name: str, reader: str | None = None) -> None:
    """From now on, `read_by` says who reads the weight of a layer of ours, and a warning says it at the first time.

    reader: the class of which it is known already, for which the warning is now.
    """
    layer.__dict__[_KEY] = _Watch(name)
    if reader is not None:
        layer.__dict__[_KEY].found(reader)


def is_watched(layer: nn.Module) -> bool:
    return _KEY in layer.__dict__


def read_by(layer: nn.Module) -> str | None:
    """The class of a module that computes with the layer's weight itself, as far as that has shown."""
    found: _Watch | None = layer.__dict__.get(_KEY)
    return None if found is None else found.reader


def mergeable(layer: nn.Module) -> None:
    """Raises ValueError where merging the layer would change what another module computes with its weight."""
    reader = read_by(layer)
    if reader is not None:
        raise ValueError(f"weight: expected one that its layer alone computes with, got one that {reader} reads itself")


def handed_out(layer: nn.Module, weight: Any) -> Any:
    """What `layer.weight` gives: the weight; an alias of it to another module's forward."""
    if torch.compiler.is_compiling() or type(weight) not in _PLAIN:
        return weight
    watch: _Watch | None = layer.__dict__.get(_KEY)
    if watch is None or watch.left == 0 or watch.reader is not None or torch._C._are_functorch_transforms_active():
        return weight
    asking = next(modules_in_forward(), layer)
    if asking is layer:
        return weight
    watch.left -= 1
    alias: Any = _of([(watch, type(asking).__name__)], weight)
    alias._is_param = isinstance(weight, nn.Parameter)  # what torch asks a subclass
    return alias


class WatchedWeight(Tensor):
    """An alias of one or several layers' weights, or what was made of nothing else: a view, a cast, a copy.

    An operation that takes it together with a tensor of other origin computes with it. A tensor without dimensions is a
    number here, and has no origin: a norm that is added to a loss is no reader.
    """

    _origins: list[tuple[_Watch, str]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            given = [tensor for tensor in tensors([*args, *kwargs.values()]) if tensor.dim() > 0]
            result = func(*args, **kwargs)
            computes = result is None or any(tensor.dim() > 0 for tensor in tensors(result))  # None of x[…] = weight
        origins = [origin for tensor in given if isinstance(tensor, cls) for origin in tensor._origins]
        if computes and any(not isinstance(tensor, cls) for tensor in given):
            for watch, reader in origins:
                watch.found(reader)
        elif computes and type(result) in _PLAIN:
            return _of(origins, result)
        return result


def _of(origins: list[tuple[_Watch, str]], tensor: Tensor) -> WatchedWeight:
    alias = tensor.as_subclass(WatchedWeight)
    alias._origins = origins
    return alias


def tensors(value: Any) -> Iterator[Tensor]:
    """Those among an operation's arguments or results."""
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
