"""Many adapters of one linear layer in paged memory.

A page holds 16 ranks: A's part [16, K] and B's part, transposed, [16, N]. An adapter of any rank is a list of pages.
So nothing is padded to the largest rank, loading and removing an adapter touch only its own pages, and free pages do
not fragment. The pool grows by chunks and never moves a page. Trainable adapters are not copied into the pool; they
stay separate Parameters (an optimizer step on a pool would change adapters that were not in the batch).

An adapter's pages return to the pool (`peftk.adapters.pages`) when nothing refers to the adapter any more: neither its
slot, nor a table, nor a call that is still running, nor a graph that waits for its backward. So adapters can be removed
and loaded while batches run.

On a CPU the table that kernels read is built anew when adapters have changed. On a GPU launches run later than the
calls that made them, and CUDA graphs are replayed without any call: there the bank has one table for good, written in
place (`peftk.adapters.live_table`), in order with the launches of all streams (`peftk.system.streams`).

Users may still hold `ids` with the number of a removed adapter, so no number is used twice. The first adapter of a slot
has the slot's number, each later one the next number that is equal to it modulo the number of slots. Kernels take
slots; `AdapterBank.slots_of` turns numbers into slots, which is needed only once a slot has been reused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from peftk.adapters import checks, handles, live_table, table
from peftk.adapters.adapter import PAGE, Adapter, FlatAdapter, flat_adapter, pages_of
from peftk.adapters.live_table import LiveTable
from peftk.adapters.pages import PagePool
from peftk.adapters.slotted_table import SlottedTable
from peftk.adapters.table import AdapterTable, WithoutTable
from peftk.system import storage, streams
from peftk.system.lasting import lasting, outside_pools
from peftk.system.streams import StreamOrder

NO_NUMBER = 2**31 - 1  # the largest int32, which no adapter of any bank has


class _CachedTable(NamedTuple):
    """A table with the state that it was built from: it is valid as long as that state is the same."""

    version: int
    lent: list[Callable[[], Adapter]]
    lent_state: list[tuple[Any, ...]]
    table: AdapterTable


def _lent_state(adapters: Sequence[Adapter]) -> list[tuple[Any, ...]] | None:
    """Everything about lent adapters that a table depends on: which tensors they are, and where these are in memory.

    None if kernels cannot read one of them. The tensors' identity counts because gradients go to the tensor that the
    table has: a different Parameter in the same memory needs a new table. id() identifies them, as the table keeps them
    alive.
    """
    found: list[tuple[Any, ...]] = []
    for a in adapters:
        tensors = a.tensors()
        if not storage.dense(*tensors):
            return None
        found.append((a.scaling, a.activation, *((id(t), *table.place(t)) for t in tensors)))
    return found


def _is_computed(adapter: Adapter) -> bool:
    """Whether tensors of a lent adapter are results of operations, so that they are others in every call."""
    return any(tensor.grad_fn is not None for tensor in adapter.tensors())


def _layout(state: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """What of a lent adapter's state is a constant of a captured graph: strides, and addresses modulo 16."""
    return [(strides, address % 16) for _, address, _, _, strides in state[2:]]


def _adapter_in(slot: Adapter | Callable[[], Adapter] | None) -> Adapter | None:
    """The adapter in a slot as it is now, or None."""
    return slot if slot is None or isinstance(slot, Adapter) else slot()


class AdapterBank:
    """Up to `max_adapters` named adapters for a layer W [N, K], and the table that the kernels read.

    Every adapter has a number to put in `ids`. number % max_adapters is its slot, and no number is used twice. All
    adapters of a bank have its dtype, torch.float32, bfloat16, float16 or float64.

    max_rank: the largest rank that may be added; None for any. On a GPU it is also the room that each adapter has in
    the table: without it the table grows with the largest rank, until a CUDA graph has captured it.

    Raises ValueError or TypeError for a bad max_adapters, max_rank or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        max_adapters: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        max_rank: int | None = None,
    ) -> None:
        checks.positive("max_adapters", max_adapters)
        if max_rank is not None:
            checks.positive("max_rank", max_rank)
        checks.adapter_dtype(dtype)
        device = torch.empty(0, device=device).device  # turns "cuda" into the current device with its index
        self.max_rank = max_rank
        self.pool = PagePool(in_features, out_features, dtype, StreamOrder(device))
        self.slots: list[Adapter | Callable[[], Adapter] | None] = [None] * max_adapters
        self.names: dict[str, int] = {}
        self.numbers = [-1] * max_adapters  # the adapters' numbers by slot; -1 for a free slot
        self.reused = False  # whether a number may differ from its slot
        self.lent = 0  # how many adapters are not the bank's own
        self.translates = False  # whether `slots_of` may have to do something: reused, or for a graph's replays
        self._next = list(range(max_adapters))  # the next number of each slot
        self._cached_numbers: tuple[int, Tensor] | None = None
        self._pages: dict[int, list[int]] = {}
        self._owners: dict[int, weakref.finalize[Any, Adapter]] = {}
        self._version = 0  # counts changes of the slots: adapters added, removed or moved
        self._cached_table: _CachedTable | None = None
        self._slotted: SlottedTable | None = None  # on a CPU: what `table` returns, as long as all are the bank's own
        self._changed: dict[int, None] = {}  # the slots that are others than in it
        self.live: LiveTable | None = None  # on a GPU
        self._live_numbers: Tensor | None = None  # the numbers on the device, for CUDA graphs
        self._mirrors: list[tuple[weakref.ref[LiveTable], int]] = []  # tables of packed banks, and which slice is ours
        self.handle = handles.new(self)
        self._removed: list[int] = []  # slots to be emptied in the live table
        self._lent_places: dict[int, tuple[Any, ...]] = {}  # the state of lent adapters in the live table, by slot
        self._renew_live()

    def free_number(self, name: str, slot: int | None = None) -> int:
        """The number for a new adapter `name`: `slot` itself, or for None a new one in the free slot used least often.

        Raises TypeError or ValueError for a bad name, a name in use, a full bank, or a bad or taken slot.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: expected a non-empty string, got {name!r}")
        if name in self.names:
            raise ValueError(f"name: expected a new one, got {name!r}, which is in use; remove it first")
        if None not in self.slots:
            raise ValueError(f"bank: expected a free slot, got {len(self.slots)} of {len(self.slots)} taken")
        if slot is None:
            return min(number for number, taken in zip(self._next, self.slots, strict=True) if taken is None)
        if not isinstance(slot, int) or isinstance(slot, bool) or not 0 <= slot < len(self.slots):
            raise ValueError(f"slot: expected a number below {len(self.slots)}, got {slot!r}")
        if self.slots[slot] is not None:
            raise ValueError(f"slot: expected a free one, got {slot}, which is taken")
        return slot

    @lasting()
    def add(
        self,
        name: str,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        *,
        activation: str = "identity",
        bias_A: Tensor | None = None,
        bias_B: Tensor | None = None,
        slot: int | None = None,
        number: int | None = None,
    ) -> int:
        """Copies the adapter `s·act(xAᵀ + a)Bᵀ + β` into pages, in the bank's dtype, and returns its number.

        Args:
            name: any non-empty string that is not in use.
            lora_A: A [R, K]; lora_B: B [N, R]; any R ≥ 1. Both None for an adapter that is only a bias.
            scaling: s, no unit. activation: see `peftk.functional.lora_linear`. bias_A: a [R]; bias_B: β [N].
            slot: the number to use, which then is not new: the caller makes sure that no ids hold it for an earlier
                adapter. None takes a number that no adapter has had.
            number: a new number of a free slot, which a server uses in all its layers.

        Raises ValueError or TypeError for bad arguments, and RuntimeError while a CUDA graph is captured; the bank is
        unchanged then. On a GPU, launches and replays that follow see the adapter, in any stream.
        """
        free = self.free_number(name, slot)
        number = free if number is None else number
        pool = self.pool
        self._check_shapes((lora_A, lora_B, scaling, activation, bias_A, bias_B))
        for key, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("bias_A", bias_A), ("bias_B", bias_B)):
            if tensor is not None and pool.device.type != "meta":
                checks.dense(key, tensor)
        rank = 0 if lora_A is None else lora_A.shape[0]
        self.check_addition(rank)
        with self.order.write():
            self._clear_removed()
            self.order.settle()
            biases = [
                None if b is None else b.detach().to(pool.device, pool.dtype, copy=True).contiguous()
                for b in (bias_A, bias_B)
            ]
            pages = pool.take(pages_of(rank))
            adapter = Adapter(*self._views(pages, rank), float(scaling), activation, *biases)
            if lora_A is not None and lora_B is not None:
                for page, (page_A, page_B) in enumerate(zip(adapter.pages_A, adapter.pages_B, strict=True)):
                    ranks = slice(page * PAGE, page * PAGE + page_A.shape[0])
                    page_A.copy_(lora_A[ranks])
                    page_B.copy_(lora_B[:, ranks])
            self._set_slot(number % len(self.slots), adapter, pages)
            self._register(name, number)
            self._write_live(number % len(self.slots), adapter)
        self.order.finish()
        return number

    def copy(self, name: str, adapter: Adapter, number: int) -> None:
        """`add` with the tensors of an Adapter. number: a new number of a free slot."""
        self.add(
            name,
            adapter.lora_A,
            adapter.lora_B,
            adapter.scaling,
            activation=adapter.activation,
            bias_A=adapter.bias_A,
            bias_B=adapter.bias_B,
            number=number,
        )

    def keep(self, name: str, adapter: Adapter, number: int) -> None:
        """Adds an adapter without copying it, on a CPU; elsewhere it is copied into pages.

        Its tensors have the shapes of the bank and never change: the caller sees to that. number: a new number of a
        free slot. Raises ValueError or TypeError for a name in use, a taken slot, or a dtype or device that is not the
        bank's.
        """
        if self.device.type != "cpu" or self.live is not None:
            self.copy(name, adapter, number)
            return
        slot = number % len(self.slots)
        if name in self.names or self.slots[slot] is not None:
            self.free_number(name, slot)  # raises
        dtype, device = self.dtype, self.device
        for tensor in adapter.tensors():
            if tensor.dtype != dtype or tensor.device != device:
                raise ValueError(f"adapter: expected tensors of {dtype} on {device}, got others")
        self.slots[slot] = adapter
        self._register(name, number)

    def lend(self, name: str, adapter: Callable[[], Adapter], slot: int | None = None) -> int:
        """Adds an adapter without copying it (trainable Parameters); `adapter()` returns it with its current tensors.

        Returns its number. Raises ValueError or TypeError for bad arguments, and RuntimeError while a CUDA graph is
        captured or once one was, which could not read these tensors; the bank is unchanged then.
        """
        number, now = self.free_number(name, slot), adapter()
        self._check_lent(now)
        self.check_addition(now.rank)
        if self.order.captured:
            raise RuntimeError("bank: expected trainable adapters before a CUDA graph captures it, got one after that")
        with self.order.write():
            self._clear_removed()
            self.lent += 1  # before the slot: who sees a lent adapter in a slot sees this too
            self.slots[number % len(self.slots)] = adapter
            self._register(name, number)
            state = _lent_state([now])
            if state is not None and not _is_computed(now):
                self._write_live(number % len(self.slots), now)
                self._lent_places[number % len(self.slots)] = state[0]
            self._write_number(number % len(self.slots))
        self.order.finish()
        return number

    def check_addition(self, rank: int) -> None:
        """Raises ValueError or RuntimeError if an adapter of this rank cannot be added now."""
        if self.max_rank is not None and rank > self.max_rank:
            raise ValueError(f"lora_A: expected at most max_rank = {self.max_rank} ranks, got {rank}")
        if self.order.busy():
            raise RuntimeError("bank: expected no capture of a CUDA graph while adapters change, got one")
        if self.order.captured and self.live is not None and pages_of(rank) > self.live.room[0]:
            raise ValueError(
                f"lora_A: expected at most {self.live.room[0] * PAGE} ranks, for which a captured CUDA graph has room, "
                f"got {rank}; a bank with max_rank= leaves room for later adapters"
            )

    def remove(self, name: str) -> None:
        """Removes an adapter and frees its slot. Raises ValueError for an unknown name."""
        self.free(self.forget(name))

    def forget(self, name: str) -> int:
        """Removes an adapter's name and returns its number. The adapter can be used by that number until `free`."""
        number = self.number(name)
        del self.names[name]
        return number

    def free(self, number: int) -> None:
        """Frees the slot of an adapter without a name. Does nothing if a different adapter has the slot.

        On a GPU, launches and replays that follow in this stream, and launches in the others, take its number for -1.
        """
        slot = number % len(self.slots)
        if self.numbers[slot] != number:
            return
        with self.order.lock:
            if self.live is not None:
                self._removed.append(slot)
                if not self.order.busy():
                    with self.order.write():
                        self._clear_removed()
            self.numbers[slot] = -1
            was_lent, self.slots[slot] = not isinstance(self.slots[slot], Adapter), None
            self.lent -= was_lent
            self._changed[slot] = None
            self._version += 1
            self._pages.pop(slot, None)
            self._owners.pop(slot, None)

    def number(self, name: str) -> int:
        """The adapter's number, to put in `ids`. Raises ValueError for an unknown name."""
        if name not in self.names:
            known = ", ".join(sorted(self.names)) or "none"
            raise ValueError(f"name: expected a loaded adapter ({known}), got {name!r}")
        return self.names[name]

    def slots_of(self, ids: Tensor) -> Tensor:
        """The slots of the numbers in `ids`; -1 stays -1.

        Raises ValueError for a number that no adapter of the bank has. On a GPU, where checking would synchronise, such
        a number becomes one outside of the bank, which kernels treat as -1.
        """
        return _slots_of(ids, (self,))

    def numbers_on(self, device: torch.device) -> Tensor:
        """`numbers` as a tensor, cached until adapters are added or removed. On a GPU it is written in place."""
        if torch.compiler.is_compiling():
            return torch.tensor(self.numbers, device=device)
        if self._live_numbers is not None and self._live_numbers.device == device:
            self.order.read()
            return self._live_numbers
        cached = self._cached_numbers
        if cached is None or cached[0] != self._version or cached[1].device != device:
            version = self._version  # read first, as in `table`
            with lasting():
                cached = self._cached_numbers = (version, torch.tensor(self.numbers, device=device))
        return cached[1]

    @property
    def adapters(self) -> tuple[Adapter | None, ...]:
        """The adapters by slot; None for a free one."""
        return tuple(_adapter_in(slot) for slot in self.slots)

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the layer's weight."""
        return self.pool.out_features, self.pool.in_features

    @property
    def columns(self) -> tuple[int, ...]:
        """Where slices of packed outputs begin and end; () here, as there is one slice (`PackedBank` has several)."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        return self.pool.dtype

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def order(self) -> StreamOrder:
        """Of writes to pages and tables, and the launches that read them."""
        return self.pool.order

    def table(self) -> AdapterTable | None:
        """The table that the kernels read; rebuilt if adapters were added or removed, or a lent adapter's tensor moved.

        None if kernels cannot read a lent adapter's tensors, so that torch computes with them (`peftk.system.storage`).
        On a GPU, what the current stream is given from now on may read it. Raises RuntimeError if it would have to
        change while a CUDA graph is captured, or if a graph could not follow the change.
        """
        cached = self._cached_table
        if (
            cached is not None
            and cached.version == self._version
            and (not cached.lent or cached.lent_state == _lent_state([adapter() for adapter in cached.lent]))
        ):
            if self.live is not None:
                self.order.read()
            return cached.table
        del cached  # so that a table that nobody else has is written in place
        with self.order.lock:
            return self._new_table()

    def _new_table(self) -> AdapterTable | None:
        version = self._version  # read first: if another thread changes the slots meanwhile, the table counts as stale
        if not self.lent and self.live is None and self.device.type == "cpu":
            return self._slotted_table(version)
        slots = tuple(self.slots)
        adapters = tuple(_adapter_in(slot) for slot in slots)  # only once: a computed tensor is a new one each time
        lent = {number: slot for number, slot in enumerate(slots) if slot is not None and not isinstance(slot, Adapter)}
        now = {number: adapter for number, adapter in enumerate(adapters) if number in lent and adapter is not None}
        for adapter in now.values():
            self._check_lent(adapter)
        lent_state = _lent_state(list(now.values()))
        computed = any(_is_computed(adapter) for adapter in now.values())
        if self.live is not None:
            if streams.capturing(self.device) and (computed or lent_state is None):
                raise RuntimeError(
                    "bank: expected trainable adapters that are dense Parameters in a CUDA graph, got tensors of others"
                )
            if lent_state is not None and not computed:
                self._follow_lent(now, dict(zip(now, lent_state, strict=True)))
            self.order.read()
        if lent_state is None:
            return None
        if self.live is None or computed:
            built = table.build(adapters, dtype=self.dtype, device=self.device)
        else:
            built = self.live.table(adapters)
        self._cached_table = None
        if not computed and not self._removed:  # don't keep a graph alive, and empty removed slots after a capture
            self._cached_table = _CachedTable(version, list(lent.values()), lent_state, built)
        return built

    @temporarily_clear_interpreter_stack()  # the table outlives a transform of torch.func that runs
    def _slotted_table(self, version: int) -> AdapterTable:
        """The table on a CPU, where all adapters are the bank's own."""
        cached = self._cached_table
        if cached is not None and cached.version == version:  # of a thread that had the lock before
            return cached.table
        slotted, self._slotted, self._cached_table, cached = self._slotted, None, None, None  # if this fails: anew
        changed: dict[int, Any] = {}
        while self._changed:  # removed before the slot is read: what changes after that is left for the next table
            slot = self._changed.popitem()[0]
            changed[slot] = self.slots[slot]
        room = max((pages_of(adapter.rank) for adapter in changed.values() if adapter is not None), default=0)
        if slotted is None or room > slotted.room:
            changed = {slot: adapter for slot, adapter in enumerate(self.slots) if adapter is not None}
            room = max((pages_of(adapter.rank) for adapter in changed.values()), default=0)
            slotted = SlottedTable(len(self.slots), room, dtype=self.dtype, device=self.device)
        built = slotted.with_changes(changed)
        self._slotted = slotted
        self._cached_table = _CachedTable(version, [], [], built)
        return built

    @lasting()
    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves or converts the tensors that the bank owns. Lent tensors are moved by the module that owns them.

        Raises RuntimeError if a CUDA graph reads what would move.
        """
        if not self.pool.apply(fn) and self.order.captured:
            return
        for slot, adapter in enumerate(self.slots):
            if isinstance(adapter, Adapter):
                biases = [None if b is None else fn(b) for b in (adapter.bias_A, adapter.bias_B)]
                pages = self._pages.get(slot)
                if pages is None:  # it was kept
                    factors = tuple(map(fn, adapter.pages_A)), tuple(map(fn, adapter.pages_B))
                    self.slots[slot] = Adapter(*factors, adapter.scaling, adapter.activation, *biases)
                    continue
                views = self._views(pages, adapter.rank)
                self._owners.pop(slot).detach()
                self._set_slot(slot, Adapter(*views, adapter.scaling, adapter.activation, *biases), pages)
        self._version += 1
        self._slotted = None
        self._renew_live()

    # ---- the live table

    @lasting()
    def _renew_live(self) -> None:
        """Makes a live table of the bank's adapters, for which they have to be in place, if its device needs one."""
        if self.live is not None and self._live_numbers is not None:
            self.pool.give_back([], (self._live_numbers, *self.live.tensors()))
        self._live_numbers, self.live = None, None
        if not live_table.needed(self.device):
            return
        adapters = self.adapters
        ranks = [0 if adapter is None else adapter.rank for adapter in adapters]
        room = pages_of(max(self.max_rank or 0, *ranks))
        with self.order.write():
            self.translates = True
            self._live_numbers = torch.tensor(self.numbers, device=self.device)
            self.live = self._live_with(room)
            self._removed, self._lent_places = [], {}
            for slot, adapter in enumerate(adapters):
                if adapter is None:
                    continue
                if not isinstance(self.slots[slot], Adapter):
                    state = _lent_state([adapter])
                    moving = any((t.dtype, t.device) != (self.dtype, self.device) for t in adapter.tensors())
                    if state is None or moving or _is_computed(adapter):
                        continue
                    self._lent_places[slot] = state[0]
                self.live.put(slot, adapter)
        self.order.finish()

    def _live_with(self, room: int) -> LiveTable:
        return LiveTable(
            len(self.slots), [self.shape], [room], dtype=self.dtype, device=self.device, orders=[self.order]
        )

    def mirror(self, packed: LiveTable, slice: int) -> None:
        """From now on writes the bank's adapters also into a slice of a packed table, inside `order.write()`."""
        for slot, adapter in enumerate(self.adapters):
            if adapter is not None and (isinstance(self.slots[slot], Adapter) or slot in self._lent_places):
                packed.put(slot, adapter, slice)
        self._mirrors.append((weakref.ref(packed), slice))

    def _live_tables(self) -> Iterator[tuple[LiveTable, int]]:
        if self.live is not None:
            yield self.live, 0
        self._mirrors = [entry for entry in self._mirrors if entry[0]() is not None]
        for packed, slice in self._mirrors:
            found = packed()
            # a packed bank replaces a table without room
            if found is not None and self.live is not None and found.room[slice] == self.live.room[0]:
                yield found, slice

    def _write_live(self, slot: int, adapter: Adapter) -> None:
        """Writes a new adapter into the live tables, inside `order.write()`."""
        if self.live is None:
            return
        if pages_of(adapter.rank) > self.live.room[0]:
            self._renew_live()
        else:
            for live, slice in self._live_tables():
                live.put(slot, adapter, slice)
        self._write_number(slot)

    @lasting()
    def _write_number(self, slot: int) -> None:
        if self._live_numbers is not None:
            self._live_numbers[slot].fill_(self.numbers[slot])

    @lasting()
    def _clear_removed(self) -> None:
        """Empties the slots of removed adapters in the live tables, inside `order.write()`."""
        if self.live is None:
            self._removed.clear()
        while self._removed:
            slot = self._removed.pop()
            assert self._live_numbers is not None
            self._live_numbers[slot].fill_(-1)
            for live, slice in self._live_tables():
                live.clear(slot, slice)
            self._lent_places.pop(slot, None)
        self.pool.recycle()

    def _follow_lent(self, adapters: dict[int, Adapter], states: dict[int, tuple[Any, ...]]) -> None:
        """Writes the lent adapters whose tensors are not where the live table has them."""
        moved = [slot for slot in adapters if self._lent_places.get(slot) != states[slot]]
        if not moved:
            if self._removed and not self.order.busy():
                with self.order.write():
                    self._clear_removed()
            return
        for slot in moved:
            self.check_addition(adapters[slot].rank)
            before = self._lent_places.get(slot)
            if self.order.captured and (before is None or _layout(before) != _layout(states[slot])):
                raise RuntimeError(
                    "bank: expected trainable adapters with the strides and alignment that a CUDA graph has captured, "
                    "got others"
                )
        with self.order.write():
            self._clear_removed()
            self.order.settle()
            room = max(pages_of(adapters[slot].rank) for slot in moved)
            if self.live is not None and room > self.live.room[0]:
                self._renew_live()
            for slot in moved:
                for live, slice in self._live_tables():
                    live.clear(slot, slice)
                self._write_live(slot, adapters[slot])
                self._lent_places[slot] = states[slot]
        self.order.finish()

    # ---- slots and pages

    def _register(self, name: str, number: int) -> None:
        slot = number % len(self.slots)
        self.names[name] = self.numbers[slot] = number
        self._next[slot] = max(self._next[slot], number + len(self.slots))
        self.reused |= number >= len(self.slots)
        self.translates |= self.reused
        self._changed[slot] = None
        self._version += 1

    def _set_slot(self, slot: int, adapter: Adapter, pages: list[int]) -> None:
        """Puts the adapter in its slot. Its pages are freed when nothing refers to the adapter any more."""
        self.slots[slot] = adapter
        self._pages[slot] = pages
        biases = tuple(bias for bias in (adapter.bias_A, adapter.bias_B) if bias is not None)
        self._owners[slot] = weakref.finalize(adapter, self.pool.give_back, pages, biases)
        self._owners[slot].atexit = False

    def _check_shapes(self, adapter: FlatAdapter) -> None:
        lora_A, lora_B, scaling, activation, bias_A, bias_B = adapter
        N, K = self.shape
        checks.adapter_shapes(N, K, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)

    def _check_lent(self, adapter: Adapter) -> None:
        pool = self.pool
        self._check_shapes(flat_adapter(adapter))
        if storage.dense(*adapter.tensors()):
            table.build((adapter,), dtype=pool.dtype, device=pool.device)  # raises if kernels cannot read it

    def _views(self, pages: list[int], rank: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        views = [self.pool.page(page, min(PAGE, rank - number * PAGE)) for number, page in enumerate(pages)]
        return tuple(A for A, _ in views), tuple(B for _, B in views)

    def __getstate__(self) -> dict[str, Any]:
        # A copy builds a table with its own addresses, owns its own pages, and makes adapters from views of its pool.
        slots = [self._slot_state(number) for number in range(len(self.slots))]
        cached = {"_cached_table": None, "_slotted": None, "_cached_numbers": None, "live": None, "_live_numbers": None}
        return {**self.__dict__, **cached, "_owners": {}, "_mirrors": [], "_removed": [], "slots": slots}

    def _slot_state(self, number: int) -> Any:
        slot = self.slots[number]
        if not isinstance(slot, Adapter):
            return slot
        if number not in self._pages:  # it was kept: a copy is without the table's entry, which has its addresses
            return dataclasses.replace(slot)
        return slot.rank, slot.scaling, slot.activation, slot.bias_A, slot.bias_B

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = handles.new(self)
        for slot, kept in enumerate(state["slots"]):
            if isinstance(kept, tuple):
                rank, *rest = kept
                pages = self._pages[slot]
                self._set_slot(slot, Adapter(*self._views(pages, rank), *rest), pages)
        self._renew_live()


def _slots_of(ids: Tensor, banks: Sequence[AdapterBank]) -> Tensor:
    if not any(bank.reused for bank in banks) and (banks[0].live is None or not _in_graph(banks[0])):
        return ids  # they are slots
    if getattr(ids, "dtype", None) not in (torch.int32, torch.int64):
        return ids  # no ids at all, which a later check finds
    slots = ids % len(banks[0].slots)
    numbers = torch.stack([bank.numbers_on(ids.device)[slots.long()] for bank in banks])
    same = numbers == ids
    unknown = (ids >= 0) & ~((same | (numbers == -1)).all(0) & same.any(0))
    if not torch.compiler.is_compiling() and checks.ids_are_checked(ids.device) and unknown.any():
        number = int(ids[unknown][0])
        raise ValueError(f"ids: expected -1 or numbers of adapters in the bank, got {number}, which none of them has")
    return torch.where(unknown, NO_NUMBER, torch.where(ids < 0, ids, slots))


def _in_graph(bank: AdapterBank) -> bool:
    """Whether a CUDA graph is being captured, for whose replays numbers will differ from slots."""
    return not torch.compiler.is_compiling() and streams.capturing(bank.device)


class PackedBank:
    """The banks of a layer with packed outputs, such as query, key and value in one projection.

    Each slice of W's rows has its own bank. banks: one per slice, in order, with the same in_features, max_adapters,
    dtype and device. An id names the adapter with that number in each bank; a slice whose bank has no adapter in that
    slot is computed by the base layer alone.

    Raises TypeError or ValueError if there are no banks or they differ.
    """

    def __init__(self, banks: Sequence[AdapterBank]) -> None:
        self.banks = tuple(banks)
        if not self.banks:
            raise ValueError("banks: expected one or more, got none")
        for number, bank in enumerate(self.banks):
            if not isinstance(bank, AdapterBank):
                raise TypeError(f"banks[{number}]: expected an AdapterBank, got {type(bank).__name__}")
            if bank.pool.in_features != self.banks[0].pool.in_features:
                raise ValueError(
                    f"banks[{number}]: expected in_features {self.banks[0].pool.in_features} as in the first one, "
                    f"got {bank.pool.in_features}"
                )
        self._packed: tuple[list[AdapterTable], AdapterTable] | None = None
        self._live: LiveTable | None = None
        self.handle = handles.new(self)
        self.table()  # raises if the banks differ

    @property
    def lent(self) -> int:
        """How many adapters are not the banks' own."""
        return sum(bank.lent for bank in self.banks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The columns of each slice."""
        return tuple(bank.pool.out_features for bank in self.banks)

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the layer's weight."""
        return sum(self.sizes), self.banks[0].pool.in_features

    @property
    def adapters(self) -> tuple[Adapter | None, ...]:
        """The adapters of the first bank by slot, then those of the second, …; None for a free slot."""
        return tuple(adapter for bank in self.banks for adapter in bank.adapters)

    @property
    def columns(self) -> tuple[int, ...]:
        """Where each slice begins, and where the last one ends."""
        return tuple(itertools.accumulate(self.sizes, initial=0))

    @property
    def device(self) -> torch.device:
        return self.banks[0].device

    def slots_of(self, ids: Tensor) -> Tensor:
        """As `AdapterBank.slots_of`. In each bank, the slot of a number must hold that number or be free."""
        return _slots_of(ids, self.banks)

    def table(self) -> AdapterTable | None:
        """The table that the kernels read; rebuilt if a bank's table was. None if a bank's table is None."""
        tables: list[AdapterTable] = []
        for bank in self.banks:
            found = bank.table()
            if found is None:
                return None
            tables.append(found)
        packed = self._packed
        if packed is None or any(old is not new for old, new in zip(packed[0], tables, strict=True)):
            live = all(one.live is not None for one in tables)
            packed = self._packed = (tables, self._live_table(tables) if live else table.pack(tables, self.sizes))
        return packed[1]

    def _live_table(self, tables: Sequence[AdapterTable]) -> AdapterTable:
        """One live table for all slices, into which the banks write from now on."""
        table.check_alike(tables)
        room = tuple(one.room[0] for one in tables)
        if self._live is None or self._live.room != room:
            first, orders = self.banks[0], [bank.order for bank in self.banks]
            if any(order.busy() for order in orders):
                raise RuntimeError("bank: expected packed banks to be used once before a CUDA graph captures them")
            if self._live is not None:
                first.pool.give_back([], self._live.tensors())
            shapes = [bank.shape for bank in self.banks]
            with contextlib.ExitStack() as writing:
                for order in orders:
                    writing.enter_context(order.write())
                self._live = outside_pools(
                    first.device,
                    lambda: LiveTable(
                        len(first.slots), shapes, room, dtype=first.dtype, device=first.device, orders=orders
                    ),
                )
                for slice, bank in enumerate(self.banks):
                    bank.mirror(self._live, slice)
            orders[0].finish()
        return self._live.table(self.adapters)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_live": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = handles.new(self)


AnyBank = AdapterBank | PackedBank | AdapterTable | WithoutTable
