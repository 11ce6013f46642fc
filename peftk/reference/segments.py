"""Sorts the rows of a batch by adapter: the specification of the CUDA C++ and Triton kernels of the same name."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16


def segments(ids: Tensor, adapters: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids int32 or int64 [M] → order, ids, ends, starts, owners, blocks.

    A segment is the rows of one adapter, or of none (-1). An id outside 0 … adapters - 1 counts as -1.

        order   int64 [M]           the original row at each sorted place; rows of one adapter keep their order
        ids     int32 [M]           the adapter at each sorted place, ascending
        ends    int32 [1+adapters]  the place after the last row of -1, of adapter 0, of adapter 1, …
        starts  int32 [S+1]         S = min(M, adapters+1): the first place of each non-empty segment, in order; M from
                                    the number of segments on
        owners  int32 [S+1]         the adapter of each of these segments; -1 from the number of segments on
        blocks  int32 [⌈M/16⌉]      the index (into starts) of the segment that holds place 16·b
    """
    M, S = ids.shape[0], min(ids.shape[0], adapters + 1)
    known = torch.where((ids >= 0) & (ids < adapters), ids, -1).to(torch.int32)
    sorted_ids, order = torch.sort(known, stable=True)
    sizes = torch.bincount(sorted_ids + 1, minlength=adapters + 1)
    ends = sizes.cumsum(0)
    filled = sizes > 0
    count = int(filled.sum())
    starts = torch.full((S + 1,), M)
    owners = torch.full((S + 1,), -1)
    starts[:count] = (ends - sizes)[filled]
    owners[:count] = filled.nonzero()[:, 0] - 1
    blocks = torch.searchsorted(starts[:count], torch.arange(0, M, BLOCK), right=True) - 1
    return order, sorted_ids, ends.int(), starts.int(), owners.int(), blocks.int()
