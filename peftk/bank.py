"""Many adapters of one linear layer in paged memory.

A page holds 16 ranks: A's part [16, K] and B's part, transposed, [16, N]. Adapters of any rank are lists of pages, so
nothing is padded to the largest rank, loading and evicting touch only an adapter's own pages, and free pages never
fragment. The pool grows by chunks and never moves what it holds. Trained adapters stay separate Parameters, where they
lie (an optimizer step on a pool would move adapters that were not in the batch).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftk import checks, table
from peftk.table import PAGE, Adapter, AdapterTable

_CHUNK_PAGES = 64


class PagePool:
    """Pages of 16 ranks for one layer shape, handed out by number."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.device = dtype, device
        self.chunks: list[tuple[Tensor, Tensor]] = []
        self.free: list[int] = []

    def take(self, count: int) -> list[int]:
        """`count` free pages; grows the pool where there are not enough."""
        while len(self.free) < count:
            first = len(self.chunks) * _CHUNK_PAGES
            A = torch.zeros(_CHUNK_PAGES, PAGE, self.in_features, dtype=self.dtype, device=self.device)
            B = torch.zeros(_CHUNK_PAGES, PAGE, self.out_features, dtype=self.dtype, device=self.device)
            self.chunks.append((A, B))
            self.free += range(first + _CHUNK_PAGES - 1, first - 1, -1)
        return [self.free.pop() for _ in range(count)]

    def give(self, pages: list[int]) -> None:
        self.free += reversed(pages)

    def page(self, number: int, ranks: int) -> tuple[Tensor, Tensor]:
        """The first `ranks` ranks of a page: A's [ranks, K] and B's [N, ranks]."""
        A, B = self.chunks[number // _CHUNK_PAGES]
        return A[number % _CHUNK_PAGES, :ranks], B[number % _CHUNK_PAGES, :ranks].t()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves or converts the storage (nn.Module.to and its kin)."""
        self.chunks = [(fn(A), fn(B)) for A, B in self.chunks]
        if self.chunks:
            self.dtype, self.device = self.chunks[0][0].dtype, self.chunks[0][0].device


class AdapterBank:
    """Up to `max_adapters` named adapters for a layer W [N, K], and the table that the kernels read.

    Every adapter has a number, its slot, which is what `ids` hold. All adapters of a bank share a dtype.
    """

    def __init__(
        self, in_features: int, out_features: int, max_adapters: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if max_adapters < 1:
            raise ValueError(f"max_adapters: expected 1 or more, got {max_adapters}")
        self.pool = PagePool(in_features, out_features, dtype, device)
        self.slots: list[Adapter | None] = [None] * max_adapters
        self.pages: list[list[int]] = [[] for _ in range(max_adapters)]
        self.names: dict[str, int] = {}
        self._table: AdapterTable | None = None
        self._addresses: list[int] = []

    def free_slot(self, name: str) -> int:
        """The slot that a new adapter `name` would take. Raises ValueError for a name in use or a full bank."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: expected a non-empty string, got {name!r}")
        if name in self.names:
            raise ValueError(f"name: expected a new one, got {name!r}, which the bank holds; remove it first")
        if None not in self.slots:
            raise ValueError(f"bank: expected a free slot, got {len(self.slots)} of {len(self.slots)} taken")
        return self.slots.index(None)

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
        in_place: bool = False,
        slot: int | None = None,
    ) -> int:
        """Adds an adapter and returns its number. Its tensors are copied into pages, or with `in_place` stay where
        they are (trained Parameters). Raises ValueError or TypeError for bad arguments; the bank is unchanged then."""
        free = self.free_slot(name)
        slot = free if slot is None else slot
        if self.slots[slot] is not None:
            raise ValueError(f"slot: expected a free one, got {slot}, which is taken")
        pool = self.pool
        checks.adapter_shapes(pool.out_features, pool.in_features, lora_A, lora_B, scaling, activation, bias_A, bias_B)
        if in_place:
            pages_A = () if lora_A is None else (lora_A,)
            pages_B = () if lora_B is None else (lora_B,)
            adapter = Adapter(pages_A, pages_B, float(scaling), activation, bias_A, bias_B)
            table.build((adapter,), dtype=pool.dtype, device=pool.device)  # raises where it cannot serve as it lies
        else:
            adapter = self._copy_in(slot, lora_A, lora_B, float(scaling), activation, bias_A, bias_B)
        self.slots[slot] = adapter
        self.names[name] = slot
        self._table = None
        return slot

    def remove(self, name: str) -> None:
        """Frees the adapter's slot and pages. Raises ValueError for an unknown name."""
        slot = self.number(name)
        self.pool.give(self.pages[slot])
        self.pages[slot], self.slots[slot] = [], None
        del self.names[name]
        self._table = None

    def number(self, name: str) -> int:
        """The adapter's number for `ids`. Raises ValueError for an unknown name."""
        if name not in self.names:
            known = ", ".join(sorted(self.names)) or "none"
            raise ValueError(f"name: expected a loaded adapter ({known}), got {name!r}")
        return self.names[name]

    @property
    def adapters(self) -> tuple[Adapter | None, ...]:
        """The adapters by number; None for a free slot."""
        return tuple(self.slots)

    @property
    def device(self) -> torch.device:
        return self.pool.device

    def table(self) -> AdapterTable:
        """What the kernels read; rebuilt when adapters came or went, or a trained adapter's storage moved."""
        addresses = [t.data_ptr() for slot in self.slots if slot is not None for t in slot.tensors() if t.requires_grad]
        if self._table is None or addresses != self._addresses:
            self._table = table.build(self.adapters, dtype=self.pool.dtype, device=self.pool.device)
            self._addresses = addresses
        return self._table

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves or converts what the bank owns. Parameters in place are moved by the module that owns them."""
        self.pool.apply(fn)
        for slot, adapter in enumerate(self.slots):
            if adapter is None:
                continue
            pages = self._views(slot, adapter.rank) if self.pages[slot] else (adapter.pages_A, adapter.pages_B)
            owned = [b if b is None or b.requires_grad else fn(b) for b in (adapter.bias_A, adapter.bias_B)]
            self.slots[slot] = Adapter(*pages, adapter.scaling, adapter.activation, *owned)
        self._table = None

    def __getstate__(self) -> dict[str, object]:
        # a table holds addresses, which a copy of the bank does not share
        return {**self.__dict__, "_table": None}

    def _copy_in(
        self,
        slot: int,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        activation: str,
        bias_A: Tensor | None,
        bias_B: Tensor | None,
    ) -> Adapter:
        biases = [
            None if b is None else b.detach().to(self.pool.device, self.pool.dtype, copy=True).contiguous()
            for b in (bias_A, bias_B)
        ]
        if lora_A is None or lora_B is None:
            return Adapter((), (), scaling, activation, *biases)
        rank = lora_A.shape[0]
        self.pages[slot] = self.pool.take(-(-rank // PAGE))
        pages_A, pages_B = self._views(slot, rank)
        with torch.no_grad():
            for number, (page_A, page_B) in enumerate(zip(pages_A, pages_B, strict=True)):
                ranks = slice(number * PAGE, number * PAGE + page_A.shape[0])
                page_A.copy_(lora_A[ranks])
                page_B.copy_(lora_B[:, ranks])
        return Adapter(pages_A, pages_B, scaling, activation, *biases)

    def _views(self, slot: int, rank: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        views = [self.pool.page(page, min(PAGE, rank - number * PAGE)) for number, page in enumerate(self.pages[slot])]
        return tuple(A for A, _ in views), tuple(B for _, B in views)
