"""The table of a bank on a CPU: every slot has room for as many pages, so that the others stay when one changes.

A server's step waits for it, once in every layer after a load. So an adapter's entry is written where it is, whatever
the number of slots: unless someone still has the table, a call that runs in another thread or a graph that waits for
its backward. Their adapters must stay, so the change is then made in a copy.
"""

from __future__ import annotations

import dataclasses
import sys

import torch

from peftk.adapters import table
from peftk.adapters.adapter import PAGE, Adapter
from peftk.adapters.table import AdapterTable
from peftk.system.lasting import lasting

_UNSHARED = 2  # references to what only its owner has: the owner's, and the argument of getrefcount


class SlottedTable:
    """An `AdapterTable` for `count` slots, of which none may have more than `room` pages.

    The adapters' tensors never move: the bank owns them.
    """

    def __init__(self, count: int, room: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.room = room
        with lasting():
            rows = torch.zeros(count, 4, dtype=torch.int32, device=device)
            rows[:, 0] = torch.arange(count, device=device) * room
            self._hold(
                AdapterTable(
                    adapters=[None] * count,
                    dtype=dtype,
                    device=device,
                    max_rank=room * PAGE,
                    pages=torch.zeros(count * room, 5, dtype=torch.int64, device=device),
                    rows=rows,
                    scaling=torch.zeros(count, dtype=torch.float32, device=device),
                    biases=torch.zeros(count, 2, dtype=torch.int64, device=device),
                    room=(room,),
                )
            )

    def with_changes(self, changed: dict[int, Adapter | None]) -> AdapterTable:
        """The table with other adapters in these slots: the last one, written in place, or a copy if others have it."""
        if sys.getrefcount(self._table) > _UNSHARED or sys.getrefcount(self._table.adapters) > _UNSHARED:
            self._hold(_copied(self._table))
        found, (rows, pages, scaling, biases) = self._table, self._arrays
        for slot, adapter in changed.items():
            entry = table.EMPTY
            if adapter is not None:
                entry = table.lasting_entry(adapter, dtype=found.dtype, device=found.device)
            rows[slot, 1:] = entry.row
            if entry.pages:
                first = slot * self.room
                pages[first : first + len(entry.pages)] = entry.pages
            scaling[slot] = entry.scaling
            biases[slot] = entry.biases
            found.adapters[slot] = adapter  # type: ignore[index]  # a list here, which nobody else has
        found.derived.clear()
        return found

    def _hold(self, made: AdapterTable) -> None:
        self._table = made
        # the same memory, quicker to write
        self._arrays = tuple(tensor.numpy() for tensor in (made.rows, made.pages, made.scaling, made.biases))


@lasting()
def _copied(found: AdapterTable) -> AdapterTable:
    return dataclasses.replace(
        found,
        adapters=list(found.adapters),
        rows=found.rows.clone(),
        pages=found.pages.clone(),
        scaling=found.scaling.clone(),
        biases=found.biases.clone(),
    )
