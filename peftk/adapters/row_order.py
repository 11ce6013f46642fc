"""Whether the rows that reach a layer are still the sequences of the batch in their order: looked at in first forwards.

A shape does not tell. [4, 4, K] may be four sequences or, in a time-major model, four times; [4, K] may be one row a
sequence, or the four tokens that a router gave to this expert. So in the first forwards of a route through a model, the
functions that run are followed from its inputs to its layers. For each tensor that came of them this keeps

    a number   the dimension in which the sequences lie, in order (several rows for each where others were merged in)
    a text     what made it impossible to tell: rows were picked, sorted, summed over the batch
    nothing    no input is in it, or a function was not understood: its shape decides

What a shape decides in later forwards is then right, since it is the same code that runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.weak import WeakTensorKeyDictionary

Place = int | str

PICKED = "rows that were picked or sorted, as a router gives them to experts"
MERGED = "rows of which the sequences are no longer in order"


class RowOrder(TorchFunctionMode):
    """Follows the functions of one forward. inputs: of the model; batch: how many sequences; dim: where they lie."""

    def __init__(self, inputs: Sequence[Tensor], batch: int, dim: int) -> None:
        self.batch, self._on = batch, True
        self._places = WeakTensorKeyDictionary()
        for t in inputs:
            sides = [d for d in range(min(t.dim(), 2)) if t.shape[d] == batch]
            if dim == 0 and 0 in sides:
                self._places[t] = 0
            elif dim == 1 and len(sides) == 1:  # a time-major model may be called with [B, T] all the same
                self._places[t] = sides[0]

    def leave(self) -> None:
        self._on = False
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def look(self, x: Tensor, dim: int) -> None:
        """Raises ValueError where the rows of x are known not to be sequences, which lie in `dim`."""
        place = self._places.get(x)
        if x.dim() == 2:
            wrong = place == PICKED or (dim == 0 and place not in (None, 0))
        else:
            wrong = isinstance(place, int) and place != dim
        if wrong:
            what = place if isinstance(place, str) else f"x with sequences in dimension {place}"
            raise ValueError(
                f"route: expected x with the sequences of the batch in order in dimension {dim}, got {what} "
                f"(x {list(x.shape)}). Time-major x: batch_dim=1. Where a router moves rows: batches of one adapter"
            )

    def passed(self, x: Tensor, y: Tensor) -> None:
        """A layer of ours made y of x, row by row; it is not among the functions of torch that are seen here."""
        if x in self._places:
            self._places[y] = self._places[x]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._on or torch.compiler.is_compiling():
            return out
        if _name(func) == "__iter__":
            out = list(out)
        self._follow(_Ran(_name(func), func, args, kwargs, self.batch, self._places), out)
        return iter(out) if _name(func) == "__iter__" else out

    def _follow(self, ran: _Ran, out: Any) -> None:
        outputs = [t for t in _tensors(out) if t not in self._places]  # what is changed in place stays where it is
        inputs = [(t, self._places[t]) for t in _tensors((ran.args, ran.kwargs)) if t in self._places]
        first = ran.args[0] if ran.args else None
        if not outputs or not inputs or (ran.name.endswith("_") and outputs[0] is first):
            return
        if ran.name in _INTO or (ran.name in _FROM and any(t is first for t, _ in inputs)):
            inputs = [pair for pair in inputs if pair[0] is first]
        for y in outputs:
            places = {place if isinstance(place, str) else ran.place_or_none(t, place, y) for t, place in inputs}
            known = {place for place in places if isinstance(place, int)}
            if len(known) == 1:
                self._places[y] = known.pop()
            elif places - {None}:
                self._places[y] = PICKED if PICKED in places else MERGED


_INTO = {"scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_put"}
_FROM = {"__getitem__", "index_select", "gather", "take_along_dim", "masked_select", "take"}
_SORTS = {"index_select": 1, "gather": 1, "take_along_dim": 2, "sort": 1, "argsort": 1, "topk": 2, "flip": 1, "roll": 2}
_RESHAPES = {"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"}
_PERMUTES = {
    "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT", "H", "mH", "adjoint",
}  # fmt: skip
_PRODUCTS = {"matmul", "__matmul__", "mm", "bmm"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


class _Ran(NamedTuple):
    """A function of torch that was called."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int
    places: WeakTensorKeyDictionary

    def place_or_none(self, t: Tensor, place: int, y: Tensor) -> Place | None:
        """`place`; None for arguments that are not understood."""
        try:
            return self.place(t, place, y)
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, StopIteration, TypeError):
            return None

    def place(self, t: Tensor, place: int, y: Tensor) -> Place | None:
        """Where the sequences are in y, of which t was an input that has them in dimension `place`."""
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
        after = y.dim() - t.dim() + place  # row by row, as almost everything; shapes broadcast from the right
        return after if y.shape[after] == t.shape[place] else MERGED

    def _reshaped(self, old: torch.Size, place: int, new: torch.Size) -> Place:
        before = math.prod(old[:place])
        fits = [d for d in range(len(new)) if math.prod(new[:d]) == before and new[d] and new[d] % self.batch == 0]
        return fits[-1] if fits else MERGED

    def _other_dims(self, t: Tensor, place: int, y: Tensor) -> Place:
        """A dimension is added or taken away."""
        dims = self._dims(1, "dim", t, default=None if y.dim() < t.dim() - 1 or self.name not in _FIRST else 0)
        if self.name == "stack":
            dim = dims[0] if dims else 0
            return place + (dim <= place)
        if place in dims or not dims:
            return MERGED
        return place - sum(dim < place for dim in dims)

    def _dims(self, position: int, name: str, t: Tensor, *, default: int | None) -> list[int]:
        """The dimensions that an argument names."""
        given = self.args[position] if len(self.args) > position else self.kwargs.get(name, default)
        given = given if isinstance(given, (tuple, list)) else (given,)
        return [dim % max(t.dim(), 1) for dim in given if isinstance(dim, int)]

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
                return MERGED  # a part of other dimensions, in front of the batch
            dim, after = dim + taken, after + (i is None or isinstance(i, slice))
        return after + place - dim

    def _all_in_order(self, index: Any) -> bool:
        """Whether it names each sequence once, in order, as in x[arange(B), last], and will do so in every forward: one
        that was made of the inputs does so by chance."""
        if not isinstance(index, Tensor) or index in self.places or index.shape != (self.batch,) or _is_mask(index):
            return False
        if index.is_cuda and torch.cuda.is_current_stream_capturing():
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
        """RNNs and attention say themselves where they take the batch to be."""
        if t is not self.args[0] or t.dim() != 3:
            return None if t is not self.args[0] else MERGED  # a hidden state, keys; packed sequences
        dim = 0 if self.name in _RECURRENT and self.args[-1] else 1
        if place != dim:
            raise ValueError(
                f"route: expected a model that takes x with the sequences of the batch in dimension {place}, got one "
                f"with {self.name}, which takes dimension {dim} for the batch (x {list(t.shape)}); time-major x: "
                "batch_dim=1"
            )
        return place if y.shape[:2] == t.shape[:2] else 1 if y.dim() == 3 else None


_FIRST = {"unbind", "__iter__", "stack"}  # without a dim they take the first


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return func.__self__.__name__ if name == "__get__" else name  # of a property: T, mT


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _tensors(found: Any) -> Iterable[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from _tensors(tuple(found.values()))
    elif isinstance(found, (tuple, list)):
        for each in found:
            yield from _tensors(each)
