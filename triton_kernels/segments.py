"""The tokens of a batch in the order of their adapters, on the device and without a host synchronisation.

Up to TILE rows one launch of one program does it all: it sorts in registers. More rows take three launches over tiles
of TILE rows, a counting sort:

    sort     a tile sorts its rows in registers; how many of them have a group up to g, for every g      → running
    scan     each column of `running` summed over the tiles
    scatter  row of group g at place p of its sorted tile t goes to
                 p + (rows of lower groups in other tiles) + (rows of group g in earlier tiles)
               = p + running[last, g - 1] - running[t, g - 1] + running[t - 1, g]

Group g = id + 1, so that the base layer's rows are group 0. Nothing is decided by which program comes first, so the
result never depends on it. `docs/segments.md` derives and counts it; `peftk.reference.segments` is the specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftk.adapters.adapter import PAGE
from peftk.launch import workspace
from peftk.launch.segments import Segments, empty

PAGE = tl.constexpr(PAGE)
BLOCK = tl.constexpr(16)  # rows to an entry of `Segments.blocks`
TILE = 1024  # rows that one program sorts


def segments(ids: Tensor, adapters: int) -> Segments:
    """Sorts ids (int32 or int64, [M], any stride). An id outside 0 … adapters - 1 counts as -1.

    The launches depend on M and adapters only, so a CUDA graph can capture them.
    """
    M = ids.shape[0]
    found = empty(M, adapters, ids.device)
    with workspace.on(ids.device):
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


# Arguments that change between calls and would otherwise each compile again for 1, or for a multiple of 16.
_VARYING = ["ids", "M", "adapters", "stride", "tiles"]


@triton.jit(do_not_specialize=_VARYING[:4])
def segments_kernel(
    ids, order, sorted_ids, ends, starts, owners, blocks, M: tl.int32, adapters: tl.int32, stride: tl.int64,
    SIZE: tl.constexpr,
):  # fmt: skip
    """All of it for up to SIZE rows, by one program."""
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
    """One tile: its rows' keys, ascending, and running[tile, g] = how many of them have a group up to g."""
    tile = tl.program_id(0)
    key = _sorted_keys(ids, tile, M, adapters, stride, SIZE)
    tl.store(keys + tile * SIZE + tl.arange(0, SIZE), key)
    _store_counts(key, running + tile.to(tl.int64) * (adapters + 1), adapters, SIZE)


@triton.jit(do_not_specialize=_VARYING[2:])
def scan_kernel(running, ends, tiles: tl.int32, adapters: tl.int32, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """running[t, g] becomes the sum of running[0 … t, g]; the last of them is ends[g]."""
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
    """The rows of one tile to their places; and its share of `starts` and `owners` beyond the last segment."""
    tile = tl.program_id(0)
    at = tl.arange(0, SIZE)
    row = tl.load(keys + tile * SIZE + at)
    group = row // SIZE
    row = tile * SIZE + row % SIZE
    mine = running + tile.to(tl.int64) * (adapters + 1) + group
    real = at < M - tile * SIZE  # rows that are none sort last
    lower = real & (group > 0)
    start = tl.load(ends + group - 1, mask=lower, other=0)
    place = at + start - tl.load(mine - 1, mask=lower, other=0)
    place += tl.load(mine - (adapters + 1), mask=at < tl.where(tile > 0, M - tile * SIZE, 0), other=0)
    place = tl.where(real, place, M)

    # how many groups up to this one have rows, for the group of each row: a chunk of groups after the other
    segment = tl.zeros((SIZE,), tl.int32)
    found = 0
    for first in range(0, adapters + 1, SIZE):
        g = first + at
        upto = tl.load(ends + g, mask=g <= adapters, other=M)
        some = upto > tl.load(ends + g - 1, mask=(g > 0) & (g <= adapters), other=0)
        some = (some & (g <= adapters)).to(tl.int32)
        inside = (group >= first) & (group < first + SIZE)
        number = tl.gather(found + tl.cumsum(some, 0), tl.where(inside, group - first, 0), 0)
        segment = tl.where(inside, number - 1, segment)
        found += tl.sum(some)
    _store_rows(place, row, group, real & (place == start), segment, order, sorted_ids, starts, owners, blocks, M)
    _store_beyond(tl.maximum(found, tile * SIZE + 1) + at, starts, owners, M, adapters)


@triton.jit
def _sorted_keys(ids, tile, M, adapters, stride, SIZE: tl.constexpr):
    """group · SIZE + row of the tile, ascending: all differ, so any sort is stable. Rows from M on come last."""
    at = tl.arange(0, SIZE)
    row = tile * SIZE + at
    id = tl.load(ids + row.to(tl.int64) * stride, mask=row < M, other=-1)
    # compared before it is narrowed: an int64 may wrap to an adapter's number
    group = tl.where((id >= 0) & (id < adapters), id, -1).to(tl.int32) + 1
    return tl.sort(tl.where(row < M, group * SIZE + at, 0x7FFFFFFF))


@triton.jit
def _store_counts(key, counts, adapters, SIZE: tl.constexpr):
    """counts[g] = how many keys have a group up to g, by binary search."""
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
    """What each row says of its place; the first of a segment (head) also of the segment."""
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
    """The original rows (int64) at sorted positions; positions from M on get a row that exists."""
    place = tl.minimum(position, M - 1)
    return tl.load(order + place) if MANY else place.to(tl.int64)


@triton.jit
def segment_heads(position, id, ids, BLOCK_M: tl.constexpr):
    """True at the first row of each segment of a block, base rows excepted."""
    before = tl.load(ids + position - 1, mask=(tl.arange(0, BLOCK_M) > 0) & (id >= 0), other=-1)
    return (id >= 0) & (id != before)
