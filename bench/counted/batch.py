"""What the counts of a linear depend on: sizes, dtypes, the adapters' ranks, and how many rows use each adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from peftk.adapters.adapter import PAGE


class Segment(NamedTuple):
    """Sorted rows of one adapter, all of them or those in a block. id -1: base layer only."""

    id: int
    start: int
    rows: int


class Batch(NamedTuple):
    """One linear on M rows, of which rows_of[i] use adapter i and the rest the base layer only; no dropout.

    Kernels work on rows sorted by adapter, so the order of a batch's ids changes no count. many: adapters are chosen by
    ids; else there is one, for all rows.
    """

    M: int
    K: int
    N: int
    ranks: tuple[int, ...]
    rows_of: tuple[int, ...]
    many: bool = True
    dtype: torch.dtype = torch.bfloat16  # of x, W, bias and the outputs
    adapter_dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    adapter_biases: bool = False  # a_i and β_i, of all adapters

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def adapter_itemsize(self) -> int:
        return self.adapter_dtype.itemsize

    @property
    def z_width(self) -> int:
        return -(-max(self.ranks, default=0) // PAGE) * PAGE

    def swapped(self) -> Batch:
        """The backward is the forward with the roles of K and N exchanged."""
        return self._replace(K=self.N, N=self.K, bias=False)

    def rank(self, id: int) -> int:
        return self.ranks[id] if id >= 0 else 0

    def segments(self) -> list[Segment]:
        """In sorted order; those without rows are left out."""
        found, start = [], 0
        for id, rows in enumerate((self.M - sum(self.rows_of), *self.rows_of), start=-1):
            if rows:
                found.append(Segment(id, start, rows))
            start += rows
        return found

    def blocks(self, size: int) -> Iterator[list[Segment]]:
        """The segments of each block of `size` sorted rows, cut at its ends."""
        segments = self.segments()
        for start in range(0, self.M, size):
            cut = [
                Segment(s.id, max(s.start, start), min(s.start + s.rows, start + size) - max(s.start, start))
                for s in segments
            ]
            yield [s for s in cut if s.rows > 0]

    @property
    def used(self) -> list[Segment]:
        """The adapters that rows use."""
        return [s for s in self.segments() if s.id >= 0]

    @property
    def rank_rows(self) -> int:
        """The rank summed over all rows: how many values z has."""
        return sum(self.rank(s.id) * s.rows for s in self.used)

    @property
    def used_ranks(self) -> int:
        return sum(self.rank(s.id) for s in self.used)


def one(M: int, K: int, N: int, rank: int, **more: object) -> Batch:
    """All rows use the one adapter there is."""
    return Batch(M, K, N, (rank,), (M,), many=False, **more)  # type: ignore[arg-type]


def of_ids(K: int, N: int, ranks: Sequence[int], ids: Sequence[int], **more: object) -> Batch:
    counts = Counter(ids)
    return Batch(len(ids), K, N, tuple(ranks), tuple(counts[i] for i in range(len(ranks))), **more)  # type: ignore[arg-type]


# A factor as a sum of bf16 terms: 8 significant bits each.
TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def terms(a: torch.dtype, b: torch.dtype) -> int:
    """How many tensor-core products `arithmetic.dot` makes of one."""
    return 1 if a == b else TERMS[a] * TERMS[b]
