"""vLLM's stacked LoRA factors as adapter tables. Imports no vLLM.

vLLM keeps the adapters of a linear in slots of one tensor each, A [slots, 1, r, K] and B [slots, 1, N, r], padded with
zeros to the largest rank r; packed projections (query, key and value; gate and up) have one pair a slice. A table
(`peftk.adapters.table`) holds their addresses, so nothing is copied. Slots stay where they are: a table is made once,
with the largest rank in every slot, and when vLLM loads an adapter only its rank is written, in place: a captured CUDA
graph sees it too. A slot nobody has told us about keeps the largest rank, which is right as well: the rest is zeros.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from peftk.adapters import table as tables
from peftk.adapters.adapter import Adapter
from peftk.adapters.table import AdapterTable

Factors = Sequence[Tensor]
_count = itertools.count()
_by_number: weakref.WeakValueDictionary[int, Stacks] = weakref.WeakValueDictionary()


class Stacks:
    """The tables of the stacked factors that one model has. They live as long as this object."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, ...], AdapterTable] = {}
        self._ones: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self.number = next(_count)
        _by_number[self.number] = self

    def table(self, lora_A: Factors, lora_B: Factors) -> AdapterTable:
        """The table for y += x A B of each slice. lora_A: [slots, 1, r, K], lora_B: [slots, 1, N, r], one a slice.

        Without lora_B it is that of y [M, r] += x A, without lora_A that of y [M, N] += x B with x [M, r]: the other
        factor is the identity. Raises ValueError if they do not belong together.
        """
        key = _addresses(lora_A, lora_B)
        found = self._tables.get(key)
        if found is None:
            A = lora_A or [self._one(B.shape[0], B.shape[-1], B) for B in lora_B]
            B = lora_B or [self._one(A.shape[0], A.shape[-2], A) for A in lora_A]
            found = self._tables[key] = _build(A, B)
        return found

    def learn(self, lora_A: Factors, lora_B: Factors, slot: int) -> None:
        """Reads the ranks of an adapter that was written into a slot: up to the last that is not zero.

        Of factors whose ranks are spread over processes, so that A has fewer than B, nothing is learned.
        """
        if _belong_together(lora_A, lora_B):
            ranks = [_rank(A[slot, 0], B[slot, 0]) for A, B in zip(lora_A, lora_B, strict=True)]
            self._set_ranks(lora_A, lora_B, slot, ranks)

    def forget(self, lora_A: Factors, lora_B: Factors, slot: int) -> None:
        """A slot that was cleared: its adapter adds nothing and costs nothing."""
        if _belong_together(lora_A, lora_B):
            self._set_ranks(lora_A, lora_B, slot, [0] * len(lora_A))

    def ranks(self, lora_A: Factors, lora_B: Factors) -> list[list[int]]:
        """The rank of each slot, for each slice."""
        found = self.table(lora_A, lora_B)
        return found.rows[:, 1].view(found.slices, found.count).tolist()

    def _set_ranks(self, lora_A: Factors, lora_B: Factors, slot: int, ranks: list[int]) -> None:
        found = self.table(lora_A, lora_B)
        rows = found.rows[:, 1].view(found.slices, found.count)
        rows[:, slot] = torch.tensor(ranks, dtype=rows.dtype, device=rows.device)

    def _one(self, slots: int, r: int, like: Tensor) -> Tensor:
        """The identity [slots, 1, r, r]: the same memory for every slot."""
        key = (r, like.dtype, like.device)
        if key not in self._ones:
            self._ones[key] = torch.eye(r, dtype=like.dtype, device=like.device)
        return self._ones[key].expand(slots, 1, r, r)


def of(number: int) -> Stacks:
    """The Stacks with this number, for custom ops, which take no objects. Raises KeyError if it is gone."""
    return _by_number[number]


def _addresses(lora_A: Factors, lora_B: Factors) -> tuple[int, ...]:
    """Stacks are never moved, and a table keeps them alive, so an address and N stand for one stack."""
    return (len(lora_A), *map(Tensor.data_ptr, (*lora_A, *lora_B)), *(B.shape[-2] for B in lora_B))


def _belong_together(lora_A: Factors, lora_B: Factors) -> bool:
    return all(A.shape[2] == B.shape[3] for A, B in zip(lora_A, lora_B, strict=True))


def _build(lora_A: Factors, lora_B: Factors) -> AdapterTable:
    if len(lora_A) != len(lora_B) or not lora_A:
        raise ValueError(f"lora_A: expected as many slices as lora_B, at least 1, got {len(lora_A)} and {len(lora_B)}")
    for number, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        if A.dim() != 4 or B.dim() != 4 or A.shape[:2] != B.shape[:2] or A.shape[1] != 1 or A.shape[2] != B.shape[3]:
            raise ValueError(
                f"lora_A: expected slice {number} to be [slots, 1, r, K] beside lora_B [slots, 1, N, r], "
                f"got {list(A.shape)} and {list(B.shape)}"
            )
    each = [_slice(A, B) for A, B in zip(lora_A, lora_B, strict=True)]
    return each[0] if len(each) == 1 else tables.pack(each, [B.shape[2] for B in lora_B])


def _slice(A: Tensor, B: Tensor) -> AdapterTable:
    adapters = tuple(Adapter((A[slot, 0],), (B[slot, 0],), 1.0) for slot in range(A.shape[0]))
    return tables.build(adapters, dtype=A.dtype, device=A.device)


def _rank(A: Tensor, B: Tensor) -> int:
    """The ranks of A [r, K] and B [N, r] up to the last one that is not zero in both."""
    used = (A != 0).any(1) | (B != 0).any(0)
    return int((used * torch.arange(1, len(used) + 1, device=used.device)).amax()) if len(used) else 0
