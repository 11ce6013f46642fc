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
    starts: Tensor
    owners: Tensor
    blocks: Tensor


def segments(ids: Tensor, adapters: int) -> Segments:
    """Sorts ids (any integer type, [M]). An id outside 0 … adapters - 1 counts as -1."""
    outside = (ids < 0) | (ids >= adapters)
    sorted_ids, order = torch.sort(ids.to(torch.int32).masked_fill(outside, -1), stable=True)
    every = torch.arange(-1, adapters, dtype=torch.int32, device=ids.device)
    ends = torch.searchsorted(sorted_ids, every, right=True, out_int32=True)
    M = ids.shape[0]
    S = min(M, adapters + 1)
    if ids.device.type == "meta":
        new = lambda n: torch.empty(n, dtype=torch.int32, device="meta")
        return Segments(order, sorted_ids, ends, new(S + 1), new(S + 1), new(-(-M // 16)))
    head = torch.ones(M, dtype=torch.bool, device=ids.device)
    head[1:] = sorted_ids[1:] != sorted_ids[:-1]
    at = head.nonzero().flatten()
    starts = torch.full((S + 1,), M, dtype=torch.int32, device=ids.device)
    owners = torch.full((S + 1,), -1, dtype=torch.int32, device=ids.device)
    starts[: len(at)] = at.int()
    owners[: len(at)] = sorted_ids[at]
    blocks = (head.cumsum(0) - 1)[::16].int()
    return Segments(order, sorted_ids, ends, starts, owners, blocks)


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
