"""Counts the memory accesses and products of Triton kernels in the interpreter.

    with counting(x=x, weight=weight, lora_A=[...]) as launches:
        backend.multi_lora_linear(x, weight, ...)
    launches[0].tensors["x"].read, launches[0].flops

Every launch is one `Launch`. Bytes are attributed to tensors by address: to the names passed here, else to the names of
the launch's arguments. So an access through a pointer from a page table counts for the tensor it points into. An access
outside every known tensor is an error. Masked lanes do not count.

The interpreter's builder executes all loads, stores, atomics and products; tensor descriptors and block pointers use
the same masked loads and stores. Programs run one after another, so "written before it was read" is well-defined.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

from bench.counted.work import Launch, Traffic

Ranges = list[tuple[int, int, str]]  # first address, address behind the last, name


class _Watched:
    """The bytes of one launch: which were read before they were written, and which were written."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = sorted(set(ranges))
        starts, ends, names = zip(*self.ranges, strict=True)
        self.starts, self.ends, self.names = np.array(starts, np.uint64), np.array(ends, np.uint64), names
        if (self.ends[:-1] > self.starts[1:]).any():
            raise AssertionError(f"tensors overlap: {self.ranges}")
        self.first = np.concatenate([[0], np.cumsum(self.ends - self.starts)]).astype(np.int64)
        self.fetched, self.stored = np.zeros(self.first[-1], bool), np.zeros(self.first[-1], bool)
        self.requested = np.zeros((2, len(names)), np.int64)  # bytes read and bytes written
        self.atomics = dict.fromkeys(names, 0)
        self.flops = 0

    def touch(self, pointers: Any, mask: Any, *, write: bool) -> None:
        lanes = np.broadcast_to(np.asarray(mask.data), pointers.data.shape).astype(bool)
        address = pointers.data[lanes].astype(np.uint64).ravel()
        if not address.size:
            return
        width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        owner = np.searchsorted(self.starts, address, side="right") - 1
        outside = (owner < 0) | (address + np.uint64(width) > self.ends[owner])
        if outside.any():
            raise AssertionError(f"{'store' if write else 'load'} outside every tensor, at {hex(address[outside][0])}")
        self.requested[int(write)] += np.bincount(owner, minlength=len(self.names)) * width
        place = self.first[owner] + (address - self.starts[owner]).astype(np.int64)
        place = np.unique(place)[:, None] + np.arange(width)
        if write:
            self.stored[place] = True
        else:
            self.fetched[place] |= ~self.stored[place]

    def count_atomic(self, pointers: Any, mask: Any) -> None:
        lanes = np.broadcast_to(np.asarray(mask), pointers.data.shape).astype(bool)
        for address in pointers.data[lanes].ravel():
            owner = int(np.searchsorted(self.starts, np.uint64(address), side="right")) - 1
            if owner < 0 or address >= self.ends[owner]:
                raise AssertionError(f"atomic outside every tensor, at {hex(address)}")
            self.atomics[self.names[owner]] += 1

    def result(self, kernel: str) -> Launch:
        tensors: dict[str, Traffic] = {}
        for i, name in enumerate(self.names):
            span = slice(self.first[i], self.first[i + 1])
            read, written = (int(n) for n in self.requested[:, i])
            if read or written:
                more = Traffic(read, written, int(self.fetched[span].sum()), int(self.stored[span].sum()))
                tensors[name] = tensors.get(name, Traffic()) + more
        return Launch(kernel, tensors, self.flops, {name: n for name, n in self.atomics.items() if n})


def _ranges(name: str, tensors: Tensor | Sequence[Tensor]) -> Ranges:
    """The memory from a tensor's first to its last element. (The tensor may be a view.)"""
    found = []
    for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
        if tensor.numel():
            span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            found.append((tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size(), name))
    return found


def _inside(one: tuple[int, int, str], other: tuple[int, int, str]) -> bool:
    return other[0] <= one[0] and one[1] <= other[1]


@contextlib.contextmanager
def counting(**named: Tensor | Sequence[Tensor]) -> Iterator[list[Launch]]:
    """Yields a list to which every launch inside appends a `Launch`."""
    launches: list[Launch] = []
    known = [found for name, tensors in named.items() for found in _ranges(name, tensors)]
    original = interpreter.GridExecutor.__call__

    @functools.wraps(original)
    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        ranges = list(known)
        for name, value in [*zip(self.arg_names, args, strict=False), *kwargs.items()]:
            base = getattr(value, "base", value)  # of a tensor descriptor
            if isinstance(base, Tensor):
                ranges += [r for r in _ranges(name, base) if not any(_inside(r, other) for other in ranges)]
        watched = _Watched(ranges)
        with _watching(watched):
            result = original(self, *args, **kwargs)
        launches.append(watched.result(self.fn.__name__))
        return result

    with mock.patch.object(interpreter.GridExecutor, "__call__", launch):
        yield launches


@contextlib.contextmanager
def _watching(watched: _Watched) -> Iterator[None]:
    builder = interpreter.interpreter_builder

    def load(pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        watched.touch(pointers, mask, write=False)
        return masked_load(pointers, mask, *rest, **more)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        watched.touch(pointers, mask, write=True)
        return masked_store(pointers, value, mask, *rest, **more)

    def rmw(op: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        watched.count_atomic(pointers, mask.data)
        return atomic_rmw(op, pointers, value, mask, *rest, **more)

    def cas(pointers: Any, *rest: Any, **more: Any) -> Any:
        watched.count_atomic(pointers, True)
        return atomic_cas(pointers, *rest, **more)

    def product(a: Any, b: Any, *rest: Any, **more: Any) -> Any:
        watched.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, *rest, **more)

    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    atomic_rmw, atomic_cas, dot = builder.create_atomic_rmw, builder.create_atomic_cas, builder.create_dot
    watchers = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": rmw,
        "create_atomic_cas": cas,
        "create_dot": product,
    }
    with mock.patch.multiple(builder, **watchers):
        yield
