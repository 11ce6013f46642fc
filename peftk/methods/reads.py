"""Which linears a forward computes with, and whose weights it reads itself: seen by what it does with the weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from peftk.nn.watched import modules_in_forward, tensors


class _Span(NamedTuple):
    """Where a weight lies in its storage, whose it is, and the modules whose own affair it is to compute with it."""

    begin: int
    end: int
    layer: nn.Module
    own: set[int]  # ids of the layer and what is in it
    others: set[int]  # ids of other modules that have it as a Parameter of theirs: a tied embedding


class Reads(TorchDispatchMode):
    """While it is on, finds which of `layers` have a weight that is read elsewhere than in their own forward.

    A weight is read where an operation takes it, or a view, cast or copy of it, together with a tensor of other
    origin. A tensor without dimensions is a number, which has none. So looking at its dtype is not reading, nor is a
    copy for a log, nor a norm that is added to a loss. A module that has the same Parameter itself (a tied embedding)
    reads its own.

    read: the layers, and the class of the module that reads each. called: those that computed with their own.
    """

    supports_higher_order_operators = True  # which come to us as other operations do

    def __init__(self, model: nn.Module, layers: Collection[nn.Module]) -> None:
        super().__init__()
        self.read: dict[nn.Module, str] = {}
        self.called: set[nn.Module] = set()
        self._spans = _spans(model, layers)
        self._copies: dict[int, list[_Span]] = {}  # of storages of casts and copies
        # while there is a weak reference to a storage, no other storage gets its number
        self._numbers = [StorageWeakRef(storage) for storage in map(_storage_of, layers) if storage is not None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found: list[_Span] = []
        other_data = False
        for tensor in tensors([*args, *kwargs.values()]):
            spans = self._of(tensor)
            found += spans
            other_data |= not spans and tensor.dim() > 0
        if not found:
            return func(*args, **kwargs)
        outside = self._outside(found, reads=other_data)
        result = func(*args, **kwargs)
        if outside and not other_data:
            for tensor in tensors(result):
                storage = _storage(tensor)
                if storage is not None and storage._cdata not in self._spans and tensor.dim() > 0:
                    self._copies[storage._cdata] = outside
                    self._numbers.append(StorageWeakRef(storage))
        return result

    def _of(self, tensor: Tensor) -> list[_Span]:
        """The weights that a tensor is made of, a part of, or contains."""
        storage = _storage(tensor)
        if storage is None:
            return []
        if storage._cdata in self._copies:
            return self._copies[storage._cdata]
        begin, end = _extent(tensor)
        return [span for span in self._spans.get(storage._cdata, ()) if begin < span.end and span.begin < end]

    def _outside(self, spans: list[_Span], *, reads: bool) -> list[_Span]:
        """Those of them that none of their own modules is computing with."""
        running = list(modules_in_forward())
        ids = {id(module) for module in running}
        outside = []
        for span in spans:
            if not ids.isdisjoint(span.own):
                self.called.add(span.layer)
            elif ids.isdisjoint(span.others):
                outside.append(span)
                if reads:
                    self.read.setdefault(span.layer, type(running[0]).__name__ if running else "the model")
        return outside


def weight_of(layer: nn.Module) -> Tensor | None:
    """A linear's own weight, or that of the linear within HF PEFT's layer; None where it is computed."""
    base = getattr(layer, "base_layer", layer)
    weight = base._parameters.get("weight") if isinstance(base, nn.Module) else None
    return weight if isinstance(weight, Tensor) else None


def _spans(model: nn.Module, layers: Iterable[nn.Module]) -> dict[int, list[_Span]]:
    spans: dict[int, list[_Span]] = {}
    for layer in dict.fromkeys(layers):
        weight = weight_of(layer)
        storage = None if weight is None else _storage(weight)
        if weight is not None and storage is not None:
            own = {id(module) for module in layer.modules()}
            spans.setdefault(storage._cdata, []).append(_Span(*_extent(weight), layer, own, set()))
    for module in model.modules():
        for parameter in module._parameters.values():
            storage = None if parameter is None else _storage(parameter)
            if parameter is not None and storage is not None and storage._cdata in spans:
                begin, end = _extent(parameter)
                for span in spans[storage._cdata]:
                    # what the layer lies in may hold its weight too, and reads it then
                    if begin < span.end and span.begin < end and span.layer not in set(module.modules()):
                        span.others.add(id(module))
    return spans


def _storage_of(layer: nn.Module) -> Any:
    weight = weight_of(layer)
    return None if weight is None else _storage(weight)


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors, and some subclasses
        return None


def _extent(tensor: Tensor) -> tuple[Any, Any]:
    """The bytes of its storage among which its elements lie."""
    size = tensor.element_size()
    begin = tensor.storage_offset() * size
    if tensor.numel() == 0:
        return begin, begin
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * size
