"""The table of a bank on a GPU: tensors of fixed capacity, into which adapters are written and cleared in place.

A CUDA graph that was captured with a table reads the same addresses in every replay. So they must not change when
adapters come and go, and a replay then uses those that are there. What a graph has as constants must hold for every
later adapter: the capacity, the width of z, and the memory layout of pages (`later`).

An entry is written in an order in which no launch in between finds half an adapter: its pages, scaling and biases
first, then its row, which says that they are there; and cleared the other way round. The bank's `numbers` come after
and before all that: a number in `ids` finds its slot only while everything about the adapter is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from peftk.adapters import table
from peftk.adapters.adapter import PAGE, Adapter
from peftk.adapters.table import AdapterTable
from peftk.system.lasting import lasting
from peftk.system.streams import StreamOrder


def needed(device: torch.device) -> bool:
    """Whether banks on this device have live tables: on GPUs, where launches run later and graphs are replayed."""
    return device.type == "cuda"


class LiveTable:
    """The tensors of an `AdapterTable` for `count` slots, in one slice of y's columns or several.

    Args:
        shapes: [N, K] of the adapters of each slice. room: the most pages that an adapter of each slice may have.
        orders: of the banks whose adapters it holds, which order the writes with the launches.
    """

    def __init__(
        self,
        count: int,
        shapes: Sequence[tuple[int, int]],
        room: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        orders: Sequence[StreamOrder],
    ) -> None:
        self.count, self.room, self.dtype, self.device, self.orders = count, tuple(room), dtype, device, tuple(orders)
        self.overwritten = 0  # how many adapters are no longer where tables made before have them
        self._firsts = list(itertools.accumulate((r for r in room for _ in range(count)), initial=0))
        self._taken = [False] * (count * len(self.room))
        with lasting():
            rows = [[first, 0, 0, 0] for first in self._firsts[:-1]]
            self.rows = torch.tensor(rows, dtype=torch.int32, device=device)
            self.pages = torch.zeros(self._firsts[-1], 5, dtype=torch.int64, device=device)
            self.scaling = torch.zeros(len(rows), dtype=torch.float32, device=device)
            self.biases = torch.zeros(len(rows), 2, dtype=torch.int64, device=device)
            self.columns, self.ends = (), None
            if len(self.room) > 1:
                self.columns = tuple(itertools.accumulate((N for N, _ in shapes), initial=0))
                z_ends = tuple(itertools.accumulate(self.room, initial=0))
                self.ends = table.slice_ends(self.columns, z_ends, device)
            self.later = tuple(_later(N, K, dtype) for N, K in shapes)

    columns: tuple[int, ...]
    ends: Tensor | None

    @lasting()
    def put(self, slot: int, adapter: Adapter, slice: int = 0) -> None:
        """Writes an adapter into an empty slot. Raises as `table.build`; nothing has changed then."""
        number = slice * self.count + slot
        entry = table.entry_of(adapter, slot, dtype=self.dtype, device=self.device)
        assert len(entry.pages) <= self.room[slice]
        assert not self._taken[number]
        self._taken[number] = True
        if entry.pages:
            first = self._firsts[number]
            self.pages[first : first + len(entry.pages)].copy_(torch.tensor(entry.pages, dtype=torch.int64))
        self.scaling[number].fill_(entry.scaling)
        self.biases[number].copy_(torch.tensor(entry.biases, dtype=torch.int64))
        self.rows[number, 1:].copy_(torch.tensor(entry.row, dtype=torch.int32))

    @lasting()
    def clear(self, slot: int, slice: int = 0) -> None:
        """Empties a slot. Nothing is copied from the host, so the host does not wait."""
        number = slice * self.count + slot
        if self._taken[number]:
            self._taken[number] = False
            self.overwritten += 1
            self.rows[number, 1:].zero_()
            self.biases[number].zero_()
            self.scaling[number].zero_()

    def table(self, adapters: Sequence[Adapter | None]) -> AdapterTable:
        """What it holds now, which are these adapters."""
        return AdapterTable(
            adapters=tuple(adapters),
            dtype=self.dtype,
            device=self.device,
            max_rank=max(self.room) * PAGE,
            pages=self.pages,
            rows=self.rows,
            scaling=self.scaling,
            biases=self.biases,
            columns=self.columns,
            ends=self.ends,
            movable=table.movable(adapters),
            room=self.room,
            live=self,
            overwritten=self.overwritten,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that launches read."""
        tensors = (self.rows, self.pages, self.scaling, self.biases)
        return tensors if self.ends is None else (*tensors, self.ends)

    def is_valid(self, overwritten: int) -> bool:
        """Whether a table that was made when `overwritten` had this value is still right; the current stream reads."""
        for order in self.orders:
            order.read()
        return self.overwritten == overwritten


def _later(N: int, K: int, dtype: torch.dtype) -> Adapter:
    """How adapters lie in memory that a bank loads later, without memory: pages of a pool."""
    A, B = (torch.empty(PAGE, columns, dtype=dtype, device="meta") for columns in (K, N))
    return Adapter((A,), (B.t(),), 1.0)
