"""Checks, in a model's first forwards, that the rows that reach a layer are still the batch's sequences in order.

A shape alone does not tell. [4, 4, K] may be four sequences or, in a time-major model, four time steps; [4, K] may be
one row per sequence, or the four tokens that a router sent to this expert. So in the first forwards with a route, the
torch functions that run are followed from the model's inputs to its layers. For each tensor computed from an input this
records its `Place`:

    int    the dimension with the sequences, in order (several rows per sequence if other dimensions were merged in)
    str    why that is unknown: rows were selected, sorted, or summed over the batch
    none   nothing: no input went into it, or a function is not known here; then its shape decides

Later forwards are judged by shape alone, which is right then because the same code runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.weak import WeakTensorKeyDictionary

from peftk.system import streams

Place = int | str

PICKED = "rows that were selected or sorted, as a router does for experts"
MERGED = "rows in which the sequences are no longer in order"


class RowOrder(TorchFunctionMode):
    """Follows the torch functions of one forward. inputs: the model's; batch: number of sequences; dim: theirs in x."""

    def __init__(self, inputs: Sequence[Tensor], batch: int, dim: int) -> None:
        self.batch, self._active = batch, True
        self._places = WeakTensorKeyDictionary()
        for t in inputs:
            sides = [d for d in range(min(t.dim(), 2)) if t.shape[d] == batch]
            if dim == 0 and 0 in sides:
                self._places[t] = 0
            elif dim == 1 and len(sides) == 1:  # even a time-major model may be called with [B, T]
                self._places[t] = sides[0]

    def stop(self) -> None:
        self._active = False
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def check(self, x: Tensor, dim: int) -> None:
        """Raises ValueError if dimension `dim` of x is known not to hold the sequences in order."""
        place = self._places.get(x)
        if x.dim() == 2:
            wrong = place == PICKED or (dim == 0 and place not in (None, 0))
        else:
            wrong = isinstance(place, int) and place != dim
        if wrong:
            found = place if isinstance(place, str) else f"x with sequences in dimension {place}"
            raise ValueError(
                f"route: expected x with the sequences of the batch in order in dimension {dim}, got {found} "
                f"(x {list(x.shape)}). For time-major x pass batch_dim=1; if a router moves rows, route batches with "
                "one adapter only"
            )

    def record_layer(self, x: Tensor, y: Tensor) -> None:
        """Records that a layer of ours computed y from x, row by row: its kernels are not torch functions."""
        if x in self._places:
            self._places[y] = self._places[x]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._active or torch.compiler.is_compiling():
            return out
        if _name(func) == "__iter__":
            out = list(out)
        self._follow(_FunctionCall(_name(func), func, args, kwargs, self.batch, self._places), out)
        return iter(out) if _name(func) == "__iter__" else out

    def _follow(self, call: _FunctionCall, out: Any) -> None:
        outputs = [t for t in _tensors(out) if t not in self._places]  # a tensor changed in place keeps its place
        inputs = [(t, self._places[t]) for t in _tensors((call.args, call.kwargs)) if t in self._places]
        first = call.args[0] if call.args else None
        if not outputs or not inputs or (call.name.endswith("_") and outputs[0] is first):
            return
        if call.name in _WRITES_FIRST or (call.name in _READS_FIRST and any(t is first for t, _ in inputs)):
            inputs = [pair for pair in inputs if pair[0] is first]
        for y in outputs:
            places = {place if isinstance(place, str) else call.place_or_none(t, place, y) for t, place in inputs}
            known = {place for place in places if isinstance(place, int)}
            if len(known) == 1:
                self._places[y] = known.pop()
            elif places - {None}:
                self._places[y] = PICKED if PICKED in places else MERGED


_WRITES_FIRST = {"scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_put"}
_READS_FIRST = {"__getitem__", "index_select", "gather", "take_along_dim", "masked_select", "take"}
_SORTS = {"index_select": 1, "gather": 1, "take_along_dim": 2, "sort": 1, "argsort": 1, "topk": 2, "flip": 1, "roll": 2}
_RESHAPES = {"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"}
_PERMUTES = {
    "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT", "H", "mH", "adjoint",
}  # fmt: skip
_PRODUCTS = {"matmul", "__matmul__", "mm", "bmm"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


class _FunctionCall(NamedTuple):
    """A call of a torch function."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int
    places: WeakTensorKeyDictionary

    def place_or_none(self, t: Tensor, place: int, y: Tensor) -> Place | None:
        """`place`, or None for arguments that it does not understand."""
        try:
            return self.place(t, place, y)
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, StopIteration, TypeError):
            return None

    def place(self, t: Tensor, place: int, y: Tensor) -> Place | None:
        """The Place of the output y, if the input t has the sequences in dimension `place`."""
        name = self.name
        if name in _RESHAPES:
            return self._reshaped(t.shape, place, y.shape)
        if name in _PERMUTES:
            sizes = range(1000, 1000 + t.dim())
            moved = self.func(torch.empty(tuple(sizes), device="meta"), *self.args[1:], **self.kwargs)
            return moved.shape.index(sizes[place])
        if name == "__getitem__":
            return place if t is not self.args[0] else self._indexed(t, place, y)
        if name in ("masked_select", "take", "nonzero", "argwhere") or (name == "where" and len(self.args) == 1):
            return PICKED
        if name in _SORTS:
            dims = self._dims(_SORTS[name], "dims" if name in ("flip", "roll") else "dim", t, default=-1)
            return PICKED if place in dims else place
        if name in _PRODUCTS:
            left = t is self.args[0]
            contracted = t.dim() - (1 if left or t.dim() == 1 else 2)
            return MERGED if place == contracted else y.dim() + place - t.dim()
        if name == "einsum":
            return self._einsum(t, place)
        if name in ("embedding", "one_hot"):
            return place
        if name in _RECURRENT or name == "multi_head_attention_forward":
            return self._sequence_module(t, place, y)
        if name in ("stack", "unbind", "__iter__", "select") or y.dim() < t.dim():
            return self._other_dims(t, place, y)
        after = y.dim() - t.dim() + place  # row by row, like most functions; shapes broadcast from the right
        return after if y.shape[after] == t.shape[place] else MERGED

    def _reshaped(self, old: torch.Size, place: int, new: torch.Size) -> Place:
        before = math.prod(old[:place])
        fits = [d for d in range(len(new)) if math.prod(new[:d]) == before and new[d] and new[d] % self.batch == 0]
        return fits[-1] if fits else MERGED

    def _other_dims(self, t: Tensor, place: int, y: Tensor) -> Place:
        """The Place after a function that adds or removes a dimension."""
        dims = self._dims(1, "dim", t, default=None if y.dim() < t.dim() - 1 or self.name not in _DEFAULT_DIM_0 else 0)
        if self.name == "stack":
            dim = dims[0] if dims else 0
            return place + (dim <= place)
        if place in dims or not dims:
            return MERGED
        return place - sum(dim < place for dim in dims)

    def _dims(self, position: int, name: str, t: Tensor, *, default: int | None) -> list[int]:
        """The dimensions of t that an argument names."""
        dims = self.args[position] if len(self.args) > position else self.kwargs.get(name, default)
        dims = dims if isinstance(dims, (tuple, list)) else (dims,)
        return [dim % max(t.dim(), 1) for dim in dims if isinstance(dim, int)]

    def _indexed(self, t: Tensor, place: int, y: Tensor) -> Place:
        index = self.args[1] if isinstance(self.args[1], tuple) else (self.args[1],)
        takes = [0 if i is None or i is ... else i.dim() if _is_mask(i) else 1 for i in index]
        at = next((n for n, i in enumerate(index) if i is ...), len(index))
        rest = t.dim() - sum(takes)
        index = (*index[:at], *[slice(None)] * rest, *index[at + 1 :])
        takes = [*takes[:at], *[1] * rest, *takes[at + 1 :]]
        dim = after = 0
        for i, taken in zip(index, takes, strict=True):
            advanced = not (i is None or isinstance(i, (slice, int)))
            if dim <= place < dim + taken:
                if advanced and place == 0 and self._all_in_order(i):
                    return after
                whole = isinstance(i, slice) and len(range(t.shape[place])[i]) == t.shape[place] and (i.step or 1) > 0
                return after if whole else PICKED
            if advanced:
                return MERGED  # other dimensions, before the batch, are indexed
            dim, after = dim + taken, after + (i is None or isinstance(i, slice))
        return after + place - dim

    def _all_in_order(self, index: Any) -> bool:
        """Whether the index names each sequence once, in order, as in x[arange(B), last], in this and every forward.

        An index that was computed from the inputs may do so by chance, and does not count.
        """
        if not isinstance(index, Tensor) or index in self.places or index.shape != (self.batch,) or _is_mask(index):
            return False
        if streams.capturing(index.device):
            return False
        return torch.equal(index.cpu(), torch.arange(self.batch))

    def _einsum(self, t: Tensor, place: int) -> Place | None:
        equation, *operands = self.args
        operands = list(_tensors(operands))
        if not isinstance(equation, str) or "->" not in equation or "." in equation:
            return None
        inputs, output = equation.replace(" ", "").split("->")
        number = next(n for n, operand in enumerate(operands) if operand is t)
        return output.find(inputs.split(",")[number][place]) if inputs.split(",")[number][place] in output else MERGED

    def _sequence_module(self, t: Tensor, place: int, y: Tensor) -> Place | None:
        """The Place after an RNN or multi-head attention, which take the batch in a dimension of their own choice."""
        if t is not self.args[0] or t.dim() != 3:
            return None if t is not self.args[0] else MERGED  # None: a hidden state or keys; MERGED: packed sequences
        dim = 0 if self.name in _RECURRENT and self.args[-1] else 1
        if place != dim:
            raise ValueError(
                f"route: expected a model that takes x with the sequences of the batch in dimension {place}, got one "
                f"with {self.name}, which takes dimension {dim} for the batch (x {list(t.shape)}); for time-major x "
                "pass batch_dim=1"
            )
        return place if y.shape[:2] == t.shape[:2] else 1 if y.dim() == 3 else None


_DEFAULT_DIM_0 = {"unbind", "__iter__", "stack"}  # their default dim is 0


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return func.__self__.__name__ if name == "__get__" else name  # "__get__" for properties: T, mT


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
