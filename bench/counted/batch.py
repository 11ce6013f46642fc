"""The input of a count: sizes, dtypes, the ranks of the adapters, and how many rows use each adapter."""

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
    """One linear layer on M rows. rows_of[i] of them use adapter i, the others only the base layer; no dropout.

    Kernels work on rows sorted by adapter, so the order of the ids does not matter. many: adapters are selected by ids;
    else there is one for all rows.
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
    adapter_biases: bool = False  # whether all adapters have a_i and β_i

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
        """The batch with K and N exchanged: the backward is such a forward."""
        return self._replace(K=self.N, N=self.K, bias=False)

    def rank(self, id: int) -> int:
        return self.ranks[id] if id >= 0 else 0

    def segments(self) -> list[Segment]:
        """The segments that have rows, in sorted order."""
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
        """The sum of the ranks over all rows: the number of values of z."""
        return sum(self.rank(s.id) * s.rows for s in self.used)

    @property
    def used_ranks(self) -> int:
        return sum(self.rank(s.id) for s in self.used)


def one_adapter(M: int, K: int, N: int, rank: int, **more: object) -> Batch:
    """A batch with one adapter for all rows."""
    return Batch(M, K, N, (rank,), (M,), many=False, **more)  # type: ignore[arg-type]


def of_ids(K: int, N: int, ranks: Sequence[int], ids: Sequence[int], **more: object) -> Batch:
    """The batch with these ids, one per row; -1: base layer only."""
    counts = Counter(ids)
    return Batch(len(ids), K, N, tuple(ranks), tuple(counts[i] for i in range(len(ranks))), **more)  # type: ignore[arg-type]


# The number of bf16 terms, of 8 significant bits each, that a factor is split into.
TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def terms(a: torch.dtype, b: torch.dtype) -> int:
    """The number of tensor-core products that `arithmetic.dot` executes for one product."""
    return 1 if a == b else TERMS[a] * TERMS[b]
