"""Which tensors lie in the same memory: the same Parameter, a view of it, or two views that meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from peftk.system import storage

_WORK = 10**5  # what a search for a common byte may take; far more than two dimensions each need


class _Span(NamedTuple):
    """The bytes from a tensor's first to its last; number: which of the tensors."""

    space: str
    start: int
    end: int
    number: int


def overlapping(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """The numbers of any two that share a byte. What has no address shares with nothing but itself."""
    open_spans: list[_Span] = []
    for span in sorted(span for number, tensor in enumerate(tensors) if (span := _span(number, tensor)) is not None):
        open_spans = [one for one in open_spans if one.space == span.space and one.end > span.start]
        for one in open_spans:
            if _meet(tensors[one.number], tensors[span.number]):
                yield tuple(sorted((one.number, span.number)))  # type: ignore[misc]
        open_spans.append(span)


def _span(number: int, tensor: Tensor) -> _Span | None:
    if not storage.dense(tensor):
        return _Span("no address", id(tensor), id(tensor) + 1, number)
    if not tensor.numel():
        return None
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return _Span(str(tensor.device), start, start + (reach + 1) * tensor.itemsize, number)


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose spans meet share a byte: two halves of the columns of one matrix do not."""
    if one is other:
        return True
    try:
        return np.shares_memory(_addresses(one), _addresses(other), max_work=_WORK)  # type: ignore[arg-type]  # numpy takes any count
    except RuntimeError:  # too hard to say
        return True


def _addresses(tensor: Tensor) -> np.ndarray:
    """An array of the same bytes, which nobody may read: the addresses may be a GPU's."""
    size = tensor.itemsize
    described = {
        "version": 3,
        "data": (tensor.data_ptr(), True),
        "shape": tuple(tensor.shape),
        "strides": tuple(stride * size for stride in tensor.stride()),
        "typestr": f"|V{size}",
    }
    return np.asarray(type("Addresses", (), {"__array_interface__": described}))
