"""Records which linears a forward calls, and whose weights it reads itself, by following operations on the weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from peftk.nn.watched import modules_in_forward, tensors


class _Span(NamedTuple):
    """The bytes of a weight in its storage, its layer, and the modules that may compute with it."""

    begin: int
    end: int
    layer: nn.Module
    own: set[int]  # ids of the layer and its submodules
    others: set[int]  # ids of other modules that hold the same Parameter, such as a tied embedding


class Reads(TorchDispatchMode):
    """A dispatch mode that finds which of `layers` have a weight that is read outside of their own forward.

    A weight is read by an operation on it (or on a view, cast or copy of it) and any other tensor. 0-d tensors count as
    numbers, not as tensors. So these are not reads: looking at the dtype, a copy for a log, a norm that is added to a
    loss. A module that holds the same Parameter (a tied embedding) may read it.

    read: the layers with the class of the module that reads each. called: the layers that computed with their weight.
    """

    supports_higher_order_operators = True  # they arrive here like other operations

    def __init__(self, model: nn.Module, layers: Collection[nn.Module]) -> None:
        super().__init__()
        self.read: dict[nn.Module, str] = {}
        self.called: set[nn.Module] = set()
        self._spans = _spans(model, layers)
        self._copies: dict[int, list[_Span]] = {}  # for storages of casts and copies
        # while there is a weak reference to a storage, no other storage gets its address
        self._numbers = [StorageWeakRef(storage) for storage in map(_storage_of, layers) if storage is not None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found: list[_Span] = []
        other_data = False
        for tensor in tensors([*args, *kwargs.values()]):
            spans = self._spans_of(tensor)
            found += spans
            other_data |= not spans and tensor.dim() > 0
        if not found:
            return func(*args, **kwargs)
        outside = self._outside_of_own_modules(found, reads=other_data)
        result = func(*args, **kwargs)
        if outside and not other_data:
            for tensor in tensors(result):
                storage = _storage(tensor)
                if storage is not None and storage._cdata not in self._spans and tensor.dim() > 0:
                    self._copies[storage._cdata] = outside
                    self._numbers.append(StorageWeakRef(storage))
        return result

    def _spans_of(self, tensor: Tensor) -> list[_Span]:
        """The weights that a tensor overlaps, or was cast or copied from."""
        storage = _storage(tensor)
        if storage is None:
            return []
        if storage._cdata in self._copies:
            return self._copies[storage._cdata]
        begin, end = _extent(tensor)
        return [span for span in self._spans.get(storage._cdata, ()) if begin < span.end and span.begin < end]

    def _outside_of_own_modules(self, spans: list[_Span], *, reads: bool) -> list[_Span]:
        """The spans whose own modules are not running. Records calls, and if `reads`, readers."""
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
    """A linear's weight, or that of the linear inside of HF PEFT's layer; None if it is not a plain Parameter."""
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
                    # a module around the layer that also holds the weight counts as a reader
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
    """The range of bytes in its storage that holds the tensor's elements."""
    size = tensor.element_size()
    begin = tensor.storage_offset() * size
    if tensor.numel() == 0:
        return begin, begin
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * size
