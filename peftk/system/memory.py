"""Finds tensors that share memory: the same Parameter, a view of it, or two overlapping views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from peftk.system import storage

_WORK = 10**5  # steps allowed in numpy's search for a common byte; far more than two matrices need


class _Span(NamedTuple):
    """The range of bytes of a tensor. space: its device, or "no address"; number: its index in the list."""

    space: str
    start: int
    end: int
    number: int


def overlapping(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """The indices of every two tensors that share a byte. A tensor without an address shares only with itself."""
    open_spans: list[_Span] = []
    for span in sorted(span for number, tensor in enumerate(tensors) if (span := _span(number, tensor)) is not None):
        open_spans = [earlier for earlier in open_spans if earlier.space == span.space and earlier.end > span.start]
        for earlier in open_spans:
            if _share_a_byte(tensors[earlier.number], tensors[span.number]):
                yield tuple(sorted((earlier.number, span.number)))  # type: ignore[misc]
        open_spans.append(span)


def _span(number: int, tensor: Tensor) -> _Span | None:
    if not storage.dense(tensor):
        return _Span("no address", id(tensor), id(tensor) + 1, number)
    if not tensor.numel():
        return None
    start, bytes = tensor.data_ptr(), tensor.nbytes
    if not tensor.is_contiguous():
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        bytes = (reach + 1) * tensor.itemsize
    return _Span(str(tensor.device), start, start + bytes, number)


def _share_a_byte(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors with overlapping spans share a byte. Two column slices of one matrix, for example, do not."""
    if first is second:
        return True
    try:
        return np.shares_memory(_addresses(first), _addresses(second), max_work=_WORK)  # type: ignore[arg-type]  # numpy takes any count
    except RuntimeError:  # too many steps: assume that they do
        return True


def _addresses(tensor: Tensor) -> np.ndarray:
    """A numpy array with the tensor's addresses. Do not read its values: they may be in GPU memory."""
    size = tensor.itemsize
    described = {
        "version": 3,
        "data": (tensor.data_ptr(), True),
        "shape": tuple(tensor.shape),
        "strides": tuple(stride * size for stride in tensor.stride()),
        "typestr": f"|V{size}",
    }
    return np.asarray(type("Addresses", (), {"__array_interface__": described}))
