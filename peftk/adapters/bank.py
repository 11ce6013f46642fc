"""Many adapters of one linear layer in paged memory.

A page holds 16 ranks: A's part [16, K] and B's part, transposed, [16, N]. Adapters of any rank are lists of pages, so
nothing is padded to the largest rank, loading and evicting touch only an adapter's own pages, and free pages never
fragment. The pool grows by chunks and never moves what it holds. Trained adapters stay separate Parameters, where they
lie (an optimizer step on a pool would move adapters that were not in the batch).

An adapter's pages return to the pool when nothing refers to the adapter any more: not its slot, no table, no call that
is still running, no graph that waits for its backward. So removing and loading adapters never disturbs a batch.

An adapter's number outlives it in whatever `ids` a user still holds, so it is no other adapter's afterwards: the first
adapter of a slot has the slot's number, each later one the next number that is equal to it modulo the number of slots.
Kernels take slots; numbers become slots (`AdapterBank.slots_of`) once a slot has been used again.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftk.adapters import checks, table
from peftk.adapters.adapter import PAGE, Adapter
from peftk.adapters.table import AdapterTable
from peftk.system import storage
from peftk.system.lasting import lasting

_CHUNK_PAGES = 64
NO_NUMBER = 2**31 - 1  # that ids can hold: no adapter's, and outside of every bank


class PagePool:
    """Pages of 16 ranks for one layer shape, handed out by number."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.device = dtype, device
        self.chunks: list[tuple[Tensor, Tensor]] = []
        self.free: list[int] = []

    @lasting()
    def take(self, count: int) -> list[int]:
        """`count` free pages; grows the pool where there are not enough."""
        while len(self.free) < count:
            first = len(self.chunks) * _CHUNK_PAGES
            A = torch.zeros(_CHUNK_PAGES, PAGE, self.in_features, dtype=self.dtype, device=self.device)
            B = torch.zeros(_CHUNK_PAGES, PAGE, self.out_features, dtype=self.dtype, device=self.device)
            self.chunks.append((A, B))
            self.free.extend(range(first + _CHUNK_PAGES - 1, first - 1, -1))
        return [self.free.pop() for _ in range(count)]

    def give(self, pages: list[int]) -> None:
        self.free.extend(reversed(pages))

    def page(self, number: int, ranks: int) -> tuple[Tensor, Tensor]:
        """The first `ranks` ranks of a page: A's [ranks, K] and B's [N, ranks].

        Through .data, so that writing another page of the chunk does not count as a change of this one for autograd.
        """
        A, B = self.chunks[number // _CHUNK_PAGES]
        return A.data[number % _CHUNK_PAGES, :ranks], B.data[number % _CHUNK_PAGES, :ranks].t()

    @lasting()
    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves or converts the storage (nn.Module.to and its kin)."""
        self.chunks = [(fn(A), fn(B)) for A, B in self.chunks]
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype, self.device = probe.dtype, probe.device


class _Made(NamedTuple):
    """A table, and what it was made of: it serves as long as neither the slots nor what is lent changes."""

    version: int
    lent: list[Callable[[], Adapter]]
    where: list[tuple[Any, ...]]
    table: AdapterTable


def _where(adapters: Sequence[Adapter]) -> list[tuple[Any, ...]] | None:
    """What a table says of lent adapters: which tensors they are, and all of these but their values.

    None where no kernel can read one of them. Another Parameter in the same memory is another tensor: gradients go to
    the one that the table has. The table that this is kept beside holds the tensors, so that no later one gets the id()
    of one of them.
    """
    found: list[tuple[Any, ...]] = []
    for a in adapters:
        tensors = a.tensors()
        if not storage.dense(*tensors):
            return None
        found.append((a.scaling, a.activation, *((id(t), *table.place(t)) for t in tensors)))
    return found


def _adapter(slot: Adapter | Callable[[], Adapter] | None) -> Adapter | None:
    """What is in a slot now."""
    return slot if slot is None or isinstance(slot, Adapter) else slot()


class AdapterBank:
    """Up to `max_adapters` named adapters for a layer W [N, K], and the table that the kernels read.

    Every adapter has a number, which is what `ids` hold: number % max_adapters is its slot, and no number is given out
    twice. All adapters of a bank share a dtype.
    """

    def __init__(
        self, in_features: int, out_features: int, max_adapters: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        if not isinstance(max_adapters, int) or isinstance(max_adapters, bool) or max_adapters < 1:
            raise ValueError(f"max_adapters: expected an integer of 1 or more, got {max_adapters!r}")
        checks.adapter_dtype(dtype)
        device = torch.empty(0, device=device).device  # "cuda" is the current one, by number
        self.pool = PagePool(in_features, out_features, dtype, device)
        self.slots: list[Adapter | Callable[[], Adapter] | None] = [None] * max_adapters
        self.names: dict[str, int] = {}
        self.numbers = [-1] * max_adapters  # of the adapters by slot; -1 for a free one
        self.reused = False  # whether a number may differ from its slot
        self._next = list(range(max_adapters))  # the number that a slot gives out next
        self._found: tuple[int, Tensor] | None = None
        self._pages: dict[int, list[int]] = {}
        self._owners: dict[int, weakref.finalize[Any, Adapter]] = {}
        self._version = 0  # of the slots: counts what was added, removed, moved
        self._made: _Made | None = None

    def free_number(self, name: str, slot: int | None = None) -> int:
        """The number that a new adapter `name` takes: `slot` itself, else a new one, of the slot used least often.

        Raises ValueError for a name in use, a full bank, a taken slot.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: expected a non-empty string, got {name!r}")
        if name in self.names:
            raise ValueError(f"name: expected a new one, got {name!r}, which the bank holds; remove it first")
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
        """Copies an adapter into pages, in the bank's dtype, and returns its number.

        The number is a new one; or `slot`, where the caller sees to it that nobody holds that for another adapter; or
        `number`, new and of a free slot, which a server gives out for all its layers.

        Raises ValueError or TypeError for bad arguments; the bank is unchanged then.
        """
        free = self.free_number(name, slot)
        number = free if number is None else number
        pool = self.pool
        checks.adapter_shapes(pool.out_features, pool.in_features, lora_A, lora_B, scaling, activation, bias_A, bias_B)
        for key, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("bias_A", bias_A), ("bias_B", bias_B)):
            if tensor is not None and pool.device.type != "meta":
                checks.dense(key, tensor)
        biases = [
            None if b is None else b.detach().to(pool.device, pool.dtype, copy=True).contiguous()
            for b in (bias_A, bias_B)
        ]
        rank = 0 if lora_A is None else lora_A.shape[0]
        pages = pool.take(-(-rank // PAGE))
        adapter = Adapter(*self._views(pages, rank), float(scaling), activation, *biases)
        if lora_A is not None and lora_B is not None:
            for page, (page_A, page_B) in enumerate(zip(adapter.pages_A, adapter.pages_B, strict=True)):
                ranks = slice(page * PAGE, page * PAGE + page_A.shape[0])
                page_A.copy_(lora_A[ranks])
                page_B.copy_(lora_B[:, ranks])
        self._own(number % len(self.slots), adapter, pages)
        self._take(name, number)
        return number

    def lend(self, name: str, adapter: Callable[[], Adapter], slot: int | None = None) -> int:
        """Adds an adapter whose tensors stay where they are (trained Parameters); `adapter()` gives it as it is now.

        Raises ValueError or TypeError for bad arguments; the bank is unchanged then.
        """
        number = self.free_number(name, slot)
        self._check_lent(adapter())
        self.slots[number % len(self.slots)] = adapter
        self._take(name, number)
        return number

    def remove(self, name: str) -> None:
        """Frees the adapter's slot. Raises ValueError for an unknown name."""
        self.free(self.forget(name))

    def forget(self, name: str) -> int:
        """The number of an adapter that has no name from now on, and goes on serving until `free`."""
        number = self.number(name)
        del self.names[name]
        return number

    def free(self, number: int) -> None:
        """Frees the slot of an adapter without a name, where it still has that."""
        slot = number % len(self.slots)
        if self.numbers[slot] != number:
            return
        self.numbers[slot] = -1
        self.slots[slot] = None
        self._version += 1
        self._pages.pop(slot, None)
        self._owners.pop(slot, None)

    def number(self, name: str) -> int:
        """The adapter's number for `ids`. Raises ValueError for an unknown name."""
        if name not in self.names:
            known = ", ".join(sorted(self.names)) or "none"
            raise ValueError(f"name: expected a loaded adapter ({known}), got {name!r}")
        return self.names[name]

    def slots_of(self, ids: Tensor) -> Tensor:
        """Slots for the numbers in `ids`, which may have outlived their adapters; -1 stays.

        Raises ValueError for the number of an adapter that is gone. On a GPU, where looking would synchronise, it
        becomes a number outside of the bank, which kernels take for -1.
        """
        return _slots_of(ids, (self,))

    def numbers_on(self, device: torch.device) -> Tensor:
        """`numbers` as a tensor, made anew when adapters came or went."""
        if torch.compiler.is_compiling():
            return torch.tensor(self.numbers, device=device)
        found = self._found
        if found is None or found[0] != self._version or found[1].device != device:
            version = self._version  # looked at first, as in `table`
            with lasting():
                found = self._found = (version, torch.tensor(self.numbers, device=device))
        return found[1]

    @property
    def adapters(self) -> tuple[Adapter | None, ...]:
        """The adapters by slot; None for a free one."""
        return tuple(_adapter(slot) for slot in self.slots)

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the layer's weight."""
        return self.pool.out_features, self.pool.in_features

    @property
    def columns(self) -> tuple[int, ...]:
        """Where slices of packed outputs begin: there is one slice (`PackedBank` has several)."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        return self.pool.dtype

    @property
    def device(self) -> torch.device:
        return self.pool.device

    def table(self) -> AdapterTable | None:
        """What the kernels read; made anew when adapters came or went, or a lent adapter's tensors moved.

        None where a lent adapter's tensors are for torch to compute with (`peftk.system.storage`).
        """
        made = self._made
        if made is not None and made.version == self._version and made.where == _where([a() for a in made.lent]):
            return made.table
        version = self._version  # looked at first: what another thread adds or removes meanwhile makes the table stale
        slots = list(self.slots)
        adapters = tuple(_adapter(slot) for slot in slots)  # once: a computed tensor is another one each time
        lent = {number: slot for number, slot in enumerate(slots) if slot is not None and not isinstance(slot, Adapter)}
        now = [adapter for number, adapter in enumerate(adapters) if number in lent and adapter is not None]
        for adapter in now:
            self._check_lent(adapter)
        where = _where(now)
        if where is None:
            return None
        built = table.build(adapters, dtype=self.dtype, device=self.device)
        self._made = None
        if all(tensor.grad_fn is None for adapter in now for tensor in adapter.tensors()):  # else it holds a graph
            self._made = _Made(version, list(lent.values()), where, built)
        return built

    @lasting()
    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves or converts what the bank owns. Lent tensors are moved by the module that owns them."""
        self.pool.apply(fn)
        for slot, adapter in enumerate(self.slots):
            if isinstance(adapter, Adapter):
                biases = [None if b is None else fn(b) for b in (adapter.bias_A, adapter.bias_B)]
                pages = self._pages[slot]
                views = self._views(pages, adapter.rank)
                self._owners.pop(slot).detach()
                self._own(slot, Adapter(*views, adapter.scaling, adapter.activation, *biases), pages)
        self._version += 1

    def _take(self, name: str, number: int) -> None:
        slot = number % len(self.slots)
        self.names[name] = self.numbers[slot] = number
        self._next[slot] = max(self._next[slot], number + len(self.slots))
        self.reused |= number >= len(self.slots)
        self._version += 1

    def _own(self, slot: int, adapter: Adapter, pages: list[int]) -> None:
        """Puts the adapter in its slot; its pages are free again when it is gone for everybody."""
        self.slots[slot] = adapter
        self._pages[slot] = pages
        self._owners[slot] = weakref.finalize(adapter, self.pool.give, pages)
        self._owners[slot].atexit = False

    def _check_lent(self, adapter: Adapter) -> None:
        pool = self.pool
        lora_A, lora_B = adapter.lora_A, adapter.lora_B
        rest = (adapter.scaling, adapter.activation, adapter.bias_A, adapter.bias_B)
        checks.adapter_shapes(pool.out_features, pool.in_features, lora_A, lora_B, *rest)
        if storage.dense(*adapter.tensors()):
            table.build((adapter,), dtype=pool.dtype, device=pool.device)  # raises where it cannot run as it lies

    def _views(self, pages: list[int], rank: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        views = [self.pool.page(page, min(PAGE, rank - number * PAGE)) for number, page in enumerate(pages)]
        return tuple(A for A, _ in views), tuple(B for _, B in views)

    def __getstate__(self) -> dict[str, Any]:
        # a table holds addresses, and ownership of pages is this bank's alone; pages are views of the pool, which a
        # copy makes anew
        slots = [
            (slot.rank, slot.scaling, slot.activation, slot.bias_A, slot.bias_B) if isinstance(slot, Adapter) else slot
            for slot in self.slots
        ]
        return {**self.__dict__, "_made": None, "_found": None, "_owners": {}, "slots": slots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for slot, kept in enumerate(state["slots"]):
            if isinstance(kept, tuple):
                rank, *rest = kept
                pages = self._pages[slot]
                self._own(slot, Adapter(*self._views(pages, rank), *rest), pages)


def _slots_of(ids: Tensor, banks: Sequence[AdapterBank]) -> Tensor:
    if not any(bank.reused for bank in banks) or getattr(ids, "dtype", None) not in (torch.int32, torch.int64):
        return ids  # they are slots; or no ids at all, which is found later
    slots = ids % len(banks[0].slots)
    there = torch.stack([bank.numbers_on(ids.device)[slots.long()] for bank in banks])
    same = there == ids
    gone = (ids >= 0) & ~((same | (there == -1)).all(0) & same.any(0))
    if not torch.compiler.is_compiling() and checks.look_at_ids(ids.device) and gone.any():
        raise ValueError(f"ids: expected -1 or the numbers of adapters, got {int(ids[gone][0])}, of one that is gone")
    return torch.where(gone, NO_NUMBER, torch.where(ids < 0, ids, slots))


class PackedBank:
    """The banks of a layer with packed outputs: slices of W's rows side by side, each with adapters of its own.

    banks: one for each slice, in order, of the same max_adapters, dtype and device (query, key and value of one
    projection, say). An id names the adapter of that number in every one of them; where a bank has none in its slot,
    its slice is the base layer's.
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
        self.table()  # raises where they differ

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
        """Those of the first bank by number, then those of the second, …"""
        return tuple(adapter for bank in self.banks for adapter in bank.adapters)

    @property
    def columns(self) -> tuple[int, ...]:
        """Where each slice begins, and where the last one ends."""
        return tuple(itertools.accumulate(self.sizes, initial=0))

    @property
    def device(self) -> torch.device:
        return self.banks[0].device

    def slots_of(self, ids: Tensor) -> Tensor:
        """Slots for the numbers in `ids`, as `AdapterBank.slots_of`; in every bank they name that adapter or none."""
        return _slots_of(ids, self.banks)

    def table(self) -> AdapterTable | None:
        """What the kernels read; made anew when a bank's is. None where `AdapterBank.table` is."""
        tables: list[AdapterTable] = []
        for bank in self.banks:
            found = bank.table()
            if found is None:
                return None
            tables.append(found)
        packed = self._packed
        if packed is None or any(old is not new for old, new in zip(packed[0], tables, strict=True)):
            packed = self._packed = (tables, table.pack(tables, self.sizes))
        return packed[1]
