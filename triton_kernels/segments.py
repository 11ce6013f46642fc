"""The tokens of a batch in the order of their adapters, computed on the device without a host synchronisation."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftk import table

PAGE = tl.constexpr(table.PAGE)


class Segments(NamedTuple):
    """Depends on the ids only: one of these serves every layer of a model's forward."""

    order: Tensor  # int64 [M]: the original row at each sorted place; rows of one adapter keep their order
    ids: Tensor  # int32 [M]: the adapter at each sorted place, ascending; -1 = base layer only
    ends: Tensor  # int32 [1 + adapters]: the place after the last row of -1, of adapter 0, of adapter 1, …


def segments(ids: Tensor, adapters: int) -> Segments:
    """Sorts ids (any integer type, [M]). An id outside 0 … adapters - 1 counts as -1."""
    outside = (ids < 0) | (ids >= adapters)
    sorted_ids, order = torch.sort(ids.to(torch.int32).masked_fill(outside, -1), stable=True)
    every = torch.arange(-1, adapters, dtype=torch.int32, device=ids.device)
    return Segments(order, sorted_ids, torch.searchsorted(sorted_ids, every, right=True, out_int32=True))


@triton.jit
def rows_at(position, order, M, MANY: tl.constexpr):
    """The original rows (int64) at sorted positions; positions from M on get a row that exists."""
    place = tl.minimum(position, M - 1)
    return tl.load(order + place) if MANY else place.to(tl.int64)


@triton.jit
def segment_heads(position, id, ids, BLOCK_M: tl.constexpr):
    """True at the first row of each segment of a block, base rows excepted."""
    before = tl.load(ids + position - 1, mask=(tl.arange(0, BLOCK_M) > 0) & (id >= 0), other=-1)
    return (id >= 0) & (id != before)
