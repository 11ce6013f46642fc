"""Sorts the rows of a batch by adapter, on the device and without host synchronisation.

Up to TILE rows take one launch of one program, which sorts in registers. More rows take three launches over tiles of
TILE rows, a counting sort:

    sort     a tile sorts its rows in registers; running[t, g] = how many of its rows have a group up to g
    scan     each column of `running` is summed over the tiles
    scatter  the row of group g at place p of its sorted tile t goes to place
                 p + (rows of lower groups in other tiles) + (rows of group g in earlier tiles)
               = p + running[last, g - 1] - running[t, g - 1] + running[t - 1, g]

Group g = id + 1, so that the base layer's rows are group 0. The result does not depend on the order in which programs
run. `docs/segments.md` has the derivation and its costs; `peftk.reference.segments` is the specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftk.adapters.adapter import PAGE
from peftk.launch.segments import Segments, empty
from peftk.system import streams

PAGE = tl.constexpr(PAGE)
BLOCK = tl.constexpr(16)  # rows per entry of `Segments.blocks`
TILE = 1024  # rows that one program sorts at most


def segments(ids: Tensor, adapters: int) -> Segments:
    """The segments of ids (int32 or int64, [M], any stride). An id outside 0 … adapters - 1 counts as -1.

    The launches depend on M and adapters only, so a CUDA graph can capture them.
    """
    M = ids.shape[0]
    found = empty(M, adapters, ids.device)
    with streams.on(ids.device):
        if M <= TILE:
            size = 64 if M <= 64 else 256 if M <= 256 else TILE
            segments_kernel[(1,)](ids, *found, M, adapters, ids.stride(0), SIZE=size, num_warps=_warps(size))
        else:
            tiles = -(-M // TILE)
            keys, running = (
                torch.empty(tiles * columns, dtype=torch.int32, device=ids.device) for columns in (TILE, adapters + 1)
            )
            warps = _warps(TILE)
            sort_kernel[(tiles,)](ids, keys, running, M, adapters, ids.stride(0), SIZE=TILE, num_warps=warps)
            scan_kernel[(triton.cdiv(adapters + 1, 64),)](running, found.ends, tiles, adapters, ROWS=16, COLUMNS=64)
            scatter_kernel[(tiles,)](keys, running, *found, M, adapters, SIZE=TILE, num_warps=warps)
    return found


def _warps(size: int) -> int:
    return max(size // 128, 1)


# Arguments that change between calls. Specialized, each would be compiled again for 1 and for multiples of 16.
_VARYING = ["ids", "M", "adapters", "stride", "tiles"]


@triton.jit(do_not_specialize=_VARYING[:4])
def segments_kernel(
    ids, order, sorted_ids, ends, starts, owners, blocks, M: tl.int32, adapters: tl.int32, stride: tl.int64,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Computes all the segments of up to SIZE rows in one program."""
    place = tl.arange(0, SIZE)
    key = _sorted_keys(ids, 0, M, adapters, stride, SIZE)
    group = key // SIZE
    _store_counts(key, ends, adapters, SIZE)
    before = tl.gather(group, tl.maximum(place - 1, 0), 0)
    head = (place < M) & ((place == 0) | (group != before))
    segment = tl.cumsum(head.to(tl.int32), 0) - 1
    _store_rows(place, key % SIZE, group, head, segment, order, sorted_ids, starts, owners, blocks, M)
    _store_beyond(tl.sum(head.to(tl.int32)) + place, starts, owners, M, adapters)


@triton.jit(do_not_specialize=_VARYING[:4])
def sort_kernel(ids, keys, running, M: tl.int32, adapters: tl.int32, stride: tl.int64, SIZE: tl.constexpr):
    """Stores a tile's sorted keys, and running[tile, g] = how many of its rows have a group up to g."""
    tile = tl.program_id(0)
    key = _sorted_keys(ids, tile, M, adapters, stride, SIZE)
    tl.store(keys + tile * SIZE + tl.arange(0, SIZE), key)
    _store_counts(key, running + tile.to(tl.int64) * (adapters + 1), adapters, SIZE)


@triton.jit(do_not_specialize=_VARYING[2:])
def scan_kernel(running, ends, tiles: tl.int32, adapters: tl.int32, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Replaces running[t, g] by the sum of running[0 … t, g]. The sum over all tiles is ends[g]."""
    g = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, tiles, ROWS):
        t = first + tl.arange(0, ROWS)
        at = running + t.to(tl.int64)[:, None] * (adapters + 1) + g[None, :]
        mask = (t < tiles)[:, None] & (g <= adapters)[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0), mask=mask)
        total += tl.sum(count, 0)
    tl.store(ends + g, total, mask=g <= adapters)


@triton.jit(do_not_specialize=_VARYING[1:3])
def scatter_kernel(
    keys, running, order, sorted_ids, ends, starts, owners, blocks, M: tl.int32, adapters: tl.int32,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Stores the rows of one tile at their places, and its share of `starts` and `owners` beyond the segments."""
    tile = tl.program_id(0)
    at = tl.arange(0, SIZE)
    row = tl.load(keys + tile * SIZE + at)
    group = row // SIZE
    row = tile * SIZE + row % SIZE
    mine = running + tile.to(tl.int64) * (adapters + 1) + group
    exists = at < M - tile * SIZE  # rows from M on are sorted last
    lower = exists & (group > 0)
    start = tl.load(ends + group - 1, mask=lower, other=0)
    place = at + start - tl.load(mine - 1, mask=lower, other=0)
    place += tl.load(mine - (adapters + 1), mask=at < tl.where(tile > 0, M - tile * SIZE, 0), other=0)
    place = tl.where(exists, place, M)

    # each row's segment: how many groups below its own have rows, counted in chunks of SIZE groups
    segment = tl.zeros((SIZE,), tl.int32)
    found = 0
    for first in range(0, adapters + 1, SIZE):
        g = first + at
        upto = tl.load(ends + g, mask=g <= adapters, other=M)
        has_rows = upto > tl.load(ends + g - 1, mask=(g > 0) & (g <= adapters), other=0)
        has_rows = (has_rows & (g <= adapters)).to(tl.int32)
        inside = (group >= first) & (group < first + SIZE)
        number = tl.gather(found + tl.cumsum(has_rows, 0), tl.where(inside, group - first, 0), 0)
        segment = tl.where(inside, number - 1, segment)
        found += tl.sum(has_rows)
    _store_rows(place, row, group, exists & (place == start), segment, order, sorted_ids, starts, owners, blocks, M)
    _store_beyond(tl.maximum(found, tile * SIZE + 1) + at, starts, owners, M, adapters)


@triton.jit
def _sorted_keys(ids, tile, M, adapters, stride, SIZE: tl.constexpr):
    """group · SIZE + row of the tile, ascending. All keys differ, so any sort is stable. Rows from M on are last."""
    at = tl.arange(0, SIZE)
    row = tile * SIZE + at
    id = tl.load(ids + row.to(tl.int64) * stride, mask=row < M, other=-1)
    # compared before narrowing: an int64 might wrap to a valid id
    group = tl.where((id >= 0) & (id < adapters), id, -1).to(tl.int32) + 1
    return tl.sort(tl.where(row < M, group * SIZE + at, 0x7FFFFFFF))


@triton.jit
def _store_counts(key, counts, adapters, SIZE: tl.constexpr):
    """Stores counts[g] = how many keys have a group up to g, by binary search."""
    for first in range(0, adapters + 1, SIZE):
        g = first + tl.arange(0, SIZE)
        limit = (tl.minimum(g, adapters) + 1) * SIZE
        count = tl.zeros((SIZE,), tl.int32)
        step = SIZE // 2
        while step > 0:
            count += tl.where(tl.gather(key, count + step - 1, 0) < limit, step, 0)
            step //= 2
        count += tl.where(tl.gather(key, count, 0) < limit, 1, 0)
        tl.store(counts + g, count, mask=g <= adapters)


@triton.jit
def _store_rows(place, row, group, head, segment, order, sorted_ids, starts, owners, blocks, M):
    """Stores the entries of each row at its place, and those of the segment for its first row (head)."""
    tl.store(order + place, row.to(tl.int64), mask=place < M)
    tl.store(sorted_ids + place, group - 1, mask=place < M)
    tl.store(starts + segment, place, mask=head)
    tl.store(owners + segment, group - 1, mask=head)
    tl.store(blocks + place // BLOCK, segment, mask=(place < M) & (place % BLOCK == 0))


@triton.jit
def _store_beyond(beyond, starts, owners, M, adapters):
    inside = beyond <= tl.minimum(M, adapters + 1)
    tl.store(starts + beyond, tl.zeros_like(beyond) + M, mask=inside)
    tl.store(owners + beyond, tl.zeros_like(beyond) - 1, mask=inside)


@triton.jit
def rows_at(position, order, M, MANY: tl.constexpr):
    """The original rows (int64) at sorted positions. Positions from M on get the last row, so that loads stay valid."""
    place = tl.minimum(position, M - 1)
    return tl.load(order + place) if MANY else place.to(tl.int64)


@triton.jit
def segment_heads(position, id, ids, BLOCK_M: tl.constexpr):
    """True at the first row of each segment in a block, except for base rows (id -1)."""
    before = tl.load(ids + position - 1, mask=(tl.arange(0, BLOCK_M) > 0) & (id >= 0), other=-1)
    return (id >= 0) & (id != before)
