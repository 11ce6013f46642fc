"""The table that kernels read about the adapters of a batch: addresses, strides, ranks, scalings.

An adapter's ranks are divided into *pages* of up to 16 (`PAGE`), the smallest contraction of tensor cores. The table
holds the pages' addresses, so tensors stay where they are: a trainable `Parameter` is a sequence of pages in place, an
adapter of a bank consists of pages of a pool. To kernels they are the same. Layout (all tensors on the table's device):

    pages     int64   [P, 5]   address of A's page [r, K], its row stride,
                               address of B's page [N, r], its n-stride, its r-stride       (strides in elements)
    rows      int32   [n, 4]   first page, rank, activation code (`activations.CODES`), 1 if the slot is taken
    scaling   float32 [n]      s_i, no unit
    biases    int64   [n, 2]   address of a_i [R] or 0, address of β_i [N] or 0

Page p of an adapter of rank R holds ranks 16p … min(16p + 16, R) - 1. A's columns and both biases are contiguous.
An empty slot (column 3 of `rows` is 0) and an adapter of rank 0 have no pages. All adapters of a table have one dtype.

For packed outputs, such as query, key and value in one projection, several such tables are concatenated: first the
adapters of the first slice of columns, then those of the second. An id names one adapter of each slice (`pack`).

On a GPU a bank has one set of these tensors and writes into it in place (`peftk.adapters.live_table`), since a captured
CUDA graph reads the same addresses in every replay.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from peftk.adapters.activations import CODES
from peftk.adapters.adapter import PAGE, Adapter, pages_of
from peftk.system import storage
from peftk.system.lasting import lasting

if TYPE_CHECKING:
    from peftk.adapters.live_table import LiveTable


@dataclasses.dataclass(frozen=True)
class AdapterTable:
    """The adapters of a batch by id, and the tensors that kernels read about them; see `build` and `pack`.

    columns: where the slices of packed outputs begin, and where the last one ends; () for a single slice. Nothing of a
    table changes as long as anyone refers to it (`peftk.adapters.slotted_table`), unless it is one of a `live` table:
    its tensors hold these adapters until that has overwritten one, and `current` tells.
    """

    adapters: Sequence[Adapter | None]
    dtype: torch.dtype
    device: torch.device
    max_rank: int
    pages: Tensor
    rows: Tensor
    scaling: Tensor
    biases: Tensor
    columns: tuple[int, ...] = ()
    ends: Tensor | None = None  # int32 [slices + 1, 2]: each slice's first column and first page of z, then the ends
    movable: tuple[tuple[Tensor, Place], ...] = ()  # Parameters, with their places when the table was built
    room: tuple[int, ...] = ()  # pages of z of each slice; (): as many as its largest rank needs
    live: LiveTable | None = None
    overwritten: int = 0  # of `live`, when this table was made

    @property
    def slices(self) -> int:
        """The number of output slices with adapters of their own. Id i in slice j is entry j · count + i."""
        return max(len(self.columns) - 1, 1)

    @property
    def count(self) -> int:
        """The number of ids, which is the number of slots."""
        return len(self.adapters) // self.slices

    @functools.cached_property
    def direct(self) -> str | None:
        """The type of the device on which direct calls can read this table; None: on none. Cached: every call asks."""
        return self.device.type if self.slices == 1 or self.device.type == "cuda" else None

    @functools.cached_property
    def derived(self) -> dict[Hashable, Any]:
        """What backends derive from this table, which does not change; it goes with the table."""
        return {}

    @functools.cached_property
    def slice_pages(self) -> tuple[int, ...]:
        """See `z_pages`."""
        return tuple(itertools.accumulate(self.room, initial=0)) if self.room else z_pages(self.adapters, self.slices)

    @property
    def z_width(self) -> int:
        """The columns of the saved pre-activations z: over all slices, the sum of largest ranks rounded up to pages.

        In a live table that is the room for them.
        """
        return self.slice_pages[-1] * PAGE

    def current(self) -> AdapterTable:
        """This table, or a new one if a Parameter has moved since, or an adapter was overwritten.

        For the backward: a Parameter that was offloaded after the forward may have come back to a different address.
        """
        valid = self.live is None or self.live.is_valid(self.overwritten)
        if valid and all(place(tensor) == where for tensor, where in self.movable):
            return self
        each = [tuple(self.adapters[j * self.count : (j + 1) * self.count]) for j in range(self.slices)]
        tables = [build(adapters, dtype=self.dtype, device=self.device) for adapters in each]
        sizes = [end - start for start, end in itertools.pairwise(self.columns)]
        room = self._room()
        rebuilt = pack(tables, sizes, room) if self.slices > 1 else tables[0]
        return dataclasses.replace(rebuilt, columns=self.columns, room=room)

    def _room(self) -> tuple[int, ...]:
        """The room of a table of the same adapters; more if a Parameter was given more ranks since."""
        needed = [end - start for start, end in itertools.pairwise(z_pages(self.adapters, self.slices))]
        return tuple(map(max, self.room, needed)) if self.room else ()

    def columns_of(self, entry: int, N: int) -> tuple[int, int]:
        """The columns of y [M, N] that an entry of `adapters` adds to."""
        return (0, N) if self.slices == 1 else self.columns[entry // self.count : entry // self.count + 2]  # type: ignore[return-value]

    def z_from(self, entry: int) -> int:
        """The first column of z of an entry of `adapters`."""
        return 0 if self.slices == 1 else self.slice_pages[entry // self.count] * PAGE


class WithoutTable(NamedTuple):
    """Adapters for torch.compile and plain torch, which take tensors instead of a table of addresses."""

    adapters: tuple[Adapter | None, ...]
    device: torch.device
    columns: tuple[int, ...] = ()

    def table(self) -> None:
        """None, as `AdapterBank.table` returns for adapters that kernels cannot read."""


Place = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


def place(tensor: Tensor) -> Place:
    """A tensor's address, dtype, shape and strides: everything that a table depends on."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def z_pages(adapters: Sequence[Adapter | None], slices: int) -> tuple[int, ...]:
    """The first page of z of each slice, and the end of the last. A slice is as wide as its largest rank."""
    starts, count = [0], len(adapters) // slices
    for j in range(slices):
        ranks = (a.rank for a in adapters[j * count : (j + 1) * count] if a is not None)
        starts.append(starts[-1] + pages_of(max(ranks, default=0)))
    return tuple(starts)


@lasting()
def pack(tables: Sequence[AdapterTable], sizes: Sequence[int], room: tuple[int, ...] = ()) -> AdapterTable:
    """One table for a layer whose outputs are slices of these sizes, side by side, one table per slice.

    Raises ValueError if the tables differ in the number of ids, dtype or device.
    """
    check_alike(tables)
    first = tables[0]
    columns = tuple(itertools.accumulate(sizes, initial=0))
    adapters = tuple(adapter for table in tables for adapter in table.adapters)
    z_ends = tuple(itertools.accumulate(room, initial=0)) if room else z_pages(adapters, len(tables))
    rows, pages = [], 0
    for table in tables:
        moved = table.rows.clone()
        moved[:, 0] += pages
        pages += table.pages.shape[0]
        rows.append(moved)
    return AdapterTable(
        adapters=adapters,
        dtype=first.dtype,
        device=first.device,
        max_rank=max(table.max_rank for table in tables),
        pages=torch.cat([table.pages for table in tables]),
        rows=torch.cat(rows),
        scaling=torch.cat([table.scaling for table in tables]),
        biases=torch.cat([table.biases for table in tables]),
        columns=columns,
        ends=slice_ends(columns, z_ends, first.device),
        movable=tuple(entry for table in tables for entry in table.movable),
    )


def slice_ends(columns: Sequence[int], z_ends: Sequence[int], device: torch.device) -> Tensor:
    """`AdapterTable.ends`."""
    return torch.tensor(list(zip(columns, z_ends, strict=True)), dtype=torch.int32, device=device)


def check_alike(tables: Sequence[AdapterTable]) -> None:
    """Raises ValueError if tables for one layer differ in the number of ids, dtype or device."""
    first = tables[0]
    for number, table in enumerate(tables):
        for name, expected, got in (
            ("adapters", first.count, table.count),
            ("dtype", first.dtype, table.dtype),
            ("device", first.device, table.device),
        ):
            if expected != got:
                raise ValueError(f"banks[{number}]: expected {name} {expected} as in the first one, got {got}")


@lasting()
def build(adapters: tuple[Adapter | None, ...], *, dtype: torch.dtype, device: torch.device) -> AdapterTable:
    """The table of `adapters` (index = id, None = empty slot). It holds addresses, so build a new one if tensors move.

    Raises ValueError for a wrong dtype or device or for strides that the layout cannot express, TypeError for a tensor
    without plain memory.
    """
    pages: list[list[int]] = []
    rows: list[list[int]] = []
    biases: list[list[int]] = []
    for index, adapter in enumerate(adapters):
        entry = EMPTY if adapter is None else entry_of(adapter, index, dtype=dtype, device=device)
        rows.append([len(pages), *entry.row])
        pages += entry.pages
        biases.append(entry.biases)
    return AdapterTable(
        adapters=adapters,
        dtype=dtype,
        device=device,
        max_rank=max((a.rank for a in adapters if a is not None), default=0),
        pages=torch.tensor(pages, dtype=torch.int64, device=device).reshape(-1, 5),
        rows=torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 4),
        scaling=torch.tensor([0.0 if a is None else a.scaling for a in adapters], dtype=torch.float32, device=device),
        biases=torch.tensor(biases, dtype=torch.int64, device=device).reshape(-1, 2),
        movable=movable(adapters),
    )


def lasting_entry(adapter: Adapter, *, dtype: torch.dtype, device: torch.device) -> Entry:
    """`entry_of`, kept with the adapter, whose tensors must never move."""
    found: Entry | None = adapter.__dict__.get("_entry")
    if found is None:
        found = adapter.__dict__["_entry"] = entry_of(adapter, 0, dtype=dtype, device=device)
    return found


class Entry(NamedTuple):
    """What the table holds about one adapter: `row` without the first page."""

    pages: list[list[int]]
    row: list[int]
    scaling: float
    biases: list[int]


EMPTY = Entry([], [0, 0, 0], 0.0, [0, 0])


def entry_of(adapter: Adapter, index: int, *, dtype: torch.dtype, device: torch.device) -> Entry:
    """Raises as `build` does; index is for the errors."""
    for tensor in adapter.tensors():
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"adapters[{index}]: expected tensors of {dtype} on {device}, got {tensor.dtype} on {tensor.device}"
            )
    if device.type != "meta" and not storage.dense(*adapter.tensors()):
        found = next((why for tensor in adapter.tensors() if (why := storage.reason(tensor)) is not None), "others")
        raise TypeError(f"adapters[{index}]: expected dense tensors, got {found}")
    biases = [0 if b is None else _contiguous(b, index).data_ptr() for b in (adapter.bias_A, adapter.bias_B)]
    pages: list[list[int]] = []
    for number, (page_A, page_B) in enumerate(zip(adapter.pages_A, adapter.pages_B, strict=True)):
        if page_A.shape[0] % PAGE and number + 1 < len(adapter.pages_A):
            raise ValueError(f"adapters[{index}]: only the last page may hold fewer than {PAGE} ranks")
        if page_A.stride(1) != 1 and page_A.shape[1] > 1:
            raise ValueError(f"adapters[{index}]: expected contiguous rows in lora_A, got strides {page_A.stride()}")
        for r in range(0, page_A.shape[0], PAGE):
            pages.append(
                [
                    page_A.data_ptr() + r * page_A.stride(0) * page_A.element_size(),
                    page_A.stride(0),
                    page_B.data_ptr() + r * page_B.stride(1) * page_B.element_size(),
                    page_B.stride(0),
                    page_B.stride(1),
                ]
            )
    return Entry(pages, [adapter.rank, CODES[adapter.activation], 1], adapter.scaling, biases)


def in_rows(tensor: Tensor) -> Tensor:
    """A with contiguous rows, or a contiguous bias: the tensor itself, or a copy through which gradients pass."""
    if tensor.layout != torch.strided or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor  # a tensor that is not strided is refused later
    return tensor.contiguous()


def movable(adapters: Sequence[Adapter | None]) -> tuple[tuple[Tensor, Place], ...]:
    """The tensors that may move, with their places now."""
    return tuple((t, place(t)) for a in adapters if a is not None for t in a.tensors() if _may_move(t))


def _may_move(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad


def _contiguous(bias: Tensor, index: int) -> Tensor:
    if bias.numel() > 1 and bias.stride(0) != 1:
        raise ValueError(f"adapters[{index}]: expected a contiguous bias, got stride {bias.stride(0)}")
    return bias
