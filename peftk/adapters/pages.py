"""The memory of a bank: pages of 16 ranks, allocated by number and used again in stream order."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftk.adapters.adapter import PAGE
from peftk.system import streams
from peftk.system.lasting import lasting
from peftk.system.streams import StreamOrder

_CHUNK_PAGES = 64


class _Retired(NamedTuple):
    """Pages and tensors of an adapter that is gone, which launches given to streams before `fence` may still read."""

    pages: list[int]
    tensors: Sequence[Tensor]
    fence: list[torch.cuda.Event]


class PagePool:
    """Pages of 16 ranks for layers of one shape.

    On a GPU a page that comes back may still be read by launches that streams were given before. It is given out again
    when they are over, or, if no other page is free, with the taking stream waiting for them.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, order: StreamOrder) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.order = dtype, order
        self.chunks: list[tuple[Tensor, Tensor]] = []
        self.free: list[int] = []
        self._returned: collections.deque[tuple[list[int], Sequence[Tensor]]] = collections.deque()
        self._retired: collections.deque[_Retired] = collections.deque()

    @property
    def device(self) -> torch.device:
        return self.order.device

    @lasting()
    def take(self, count: int) -> list[int]:
        """Allocates `count` pages and returns their numbers; grows the pool if not enough are free.

        Inside `order.write()`, where the current stream, which writes them, waits for all launches that may read them.
        """
        self.recycle()
        for number, retired in enumerate(self._retired):
            if len(self.free) < count and retired.pages:
                self.free.extend(retired.pages)
                self._retired[number] = retired._replace(pages=[])
        while len(self.free) < count:
            first = len(self.chunks) * _CHUNK_PAGES
            A = torch.zeros(_CHUNK_PAGES, PAGE, self.in_features, dtype=self.dtype, device=self.device)
            B = torch.zeros(_CHUNK_PAGES, PAGE, self.out_features, dtype=self.dtype, device=self.device)
            self.chunks.append((A, B))
            self.free.extend(range(first + _CHUNK_PAGES - 1, first - 1, -1))
        return [self.free.pop() for _ in range(count)]

    def give_back(self, pages: list[int], tensors: Sequence[Tensor] = ()) -> None:
        """Frees pages, and tensors that belong to the same adapter, as soon as no launch reads them.

        Called by the garbage collector, in any thread and perhaps during a capture, so it does nothing on the device.
        """
        if streams.current(self.device) is None:
            self.free.extend(reversed(pages))
        else:
            self._returned.append((list(reversed(pages)), tensors))

    def recycle(self) -> None:
        """Frees the pages that nothing reads any more. Inside `order.write()`."""
        while self._returned:
            pages, tensors = self._returned.popleft()
            self._retired.append(_Retired(pages, tensors, self.order.fence()))
        while self._retired and all(event.query() for event in self._retired[0].fence):
            self.free.extend(self._retired.popleft().pages)

    def page(self, number: int, ranks: int) -> tuple[Tensor, Tensor]:
        """Views of the first `ranks` ranks of a page: A's [ranks, K] and B's [N, ranks].

        Taken through .data, so that autograd does not see a write to another page of the chunk as a change of this one.
        """
        A, B = self.chunks[number // _CHUNK_PAGES]
        return A.data[number % _CHUNK_PAGES, :ranks], B.data[number % _CHUNK_PAGES, :ranks].t()

    @lasting()
    def apply(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Moves or converts the storage, for nn.Module._apply (.to(), .double(), …). Returns whether anything changed.

        Raises RuntimeError if a CUDA graph reads what would move.
        """
        chunks = [(fn(A), fn(B)) for A, B in self.chunks]
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        pairs = zip(itertools.chain(*self.chunks), itertools.chain(*chunks), strict=True)
        moved = any(old.data_ptr() != new.data_ptr() for old, new in pairs)
        if not moved and (probe.dtype, probe.device) == (self.dtype, self.device):
            return False
        if self.order.captured:
            raise RuntimeError(
                f"bank: expected to stay in {self.dtype} on {self.device}, where a CUDA graph reads its adapters, got "
                f"{probe.dtype} on {probe.device}"
            )
        self.chunks, self.dtype = chunks, probe.dtype
        if probe.device != self.order.device:
            self.order = StreamOrder(probe.device)
        return True

    def __getstate__(self) -> dict[str, Any]:
        # in a copy, which nothing has read yet, they are free
        gone = [*(pages for pages, _ in self._returned), *(retired.pages for retired in self._retired)]
        free = [*self.free, *(page for pages in gone for page in pages)]
        return {**self.__dict__, "free": free, "_returned": collections.deque(), "_retired": collections.deque()}
