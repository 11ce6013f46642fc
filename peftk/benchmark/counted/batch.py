"""What the counts of a linear depend on: sizes, dtypes, the adapters' ranks, and which rows use which adapter."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from peftk.table import PAGE


class Segment(NamedTuple):
    """Rows of one adapter inside a block, in sorted order; id -1: base layer only."""

    id: int
    rows: int


class Batch(NamedTuple):
    """One linear. ids: None with one adapter, which all rows use; -1: base layer only. No dropout, no activation."""

    M: int
    K: int
    N: int
    ranks: tuple[int, ...]
    ids: tuple[int, ...] | None
    dtype: torch.dtype = torch.bfloat16  # of x, W, bias and the outputs
    adapter_dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    adapter_biases: bool = False  # a_i and β_i, of all adapters

    @property
    def many(self) -> bool:
        return self.ids is not None

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

    @property
    def rows(self) -> dict[int, int]:
        """Adapters that rows use, and by how many; without those rows that use none."""
        return {id: rows for id, (_, rows) in _runs(self).items() if id >= 0}

    def ends(self, id: int) -> tuple[int, int]:
        """The sorted places of an adapter's rows: first, and behind the last."""
        first, rows = _runs(self).get(id, (0, 0))
        return first, first + rows

    @property
    def rank_rows(self) -> int:
        """The rank summed over all rows: how many values of z there are."""
        return sum(self.rank(id) * rows for id, rows in self.rows.items())

    @property
    def used_ranks(self) -> int:
        return sum(self.rank(id) for id in self.rows)

    def blocks(self, size: int) -> Iterator[list[Segment]]:
        """The segments of each block of `size` sorted rows."""
        ids = _sorted(self)
        for start in range(0, self.M, size):
            values, counts = np.unique(ids[start : start + size], return_counts=True)
            yield [Segment(int(id), int(rows)) for id, rows in zip(values, counts, strict=True)]


@functools.lru_cache(maxsize=8)
def _sorted(batch: Batch) -> np.ndarray:
    if batch.ids is None:
        return np.zeros(batch.M, np.int64)
    return np.sort(np.array(batch.ids, np.int64))


@functools.lru_cache(maxsize=8)
def _runs(batch: Batch) -> dict[int, tuple[int, int]]:
    values, first, counts = np.unique(_sorted(batch), return_index=True, return_counts=True)
    return {int(v): (int(f), int(c)) for v, f, c in zip(values, first, counts, strict=True)}


# A factor as a sum of bf16 terms: 8 significant bits each.
TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def terms(a: torch.dtype, b: torch.dtype) -> int:
    """How many tensor-core products `arithmetic.dot` makes of one."""
    return 1 if a == b else TERMS[a] * TERMS[b]
