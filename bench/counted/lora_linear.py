"""Counts the work of the launches of `triton_kernels/lora_linear.py` in closed form, one row of tiles at a time.

It follows the kernel's code line by line, because every load of a table counts.
`tests/kernels/triton/interpreted/counted.py` checks that it equals what the interpreter executes. The number of loads
does not depend on which block computes which tile.
"""

from __future__ import annotations

import dataclasses

import torch

from bench.counted.batch import Batch, Segment, terms
from bench.counted.tally import Tally
from bench.counted.work import GPU, Launch
from peftk.adapters.adapter import PAGE
from peftk.triton_kernels import config, waves

# Products of terms of v and of the up-projection: `expand._dot_v`.
_V_PRODUCTS = {torch.bfloat16: 3, torch.float16: 5, torch.float32: 6}
_READY = 2  # counters before those of the row blocks: `tickets.READY`


def plan(batch: Batch, target: int | str, *, wide: bool = True, backward: bool = False) -> config.Plan:
    """The plan that the launcher chooses for this batch. backward: for dX; pass `batch.swapped()`."""
    return config.lora_linear(_call_shape(batch, wide=wide, backward=backward), target)


def _call_shape(batch: Batch, *, wide: bool = True, backward: bool = False) -> config.CallShape:
    return config.CallShape(
        M=batch.M,
        N=batch.N,
        K=batch.K,
        many=batch.many,
        packed=False,
        backward=backward,
        wide=wide,
        x=batch.dtype,
        weight=batch.dtype,
        adapters=batch.adapter_dtype,
        own_sums=False,
        z_pages=batch.z_width // PAGE,
    )


def forward(batch: Batch, plan: config.Plan, *, dense: bool = False, processors: int = GPU.processors) -> list[Launch]:
    """The launches of the forward. dense: z is saved, so it is written completely."""
    return _launches(batch, plan, processors, dense=dense, backward=False)


def backward(batch: Batch, plan: config.Plan, *, processors: int = GPU.processors) -> list[Launch]:
    """The launches of dX and u. batch: of the forward; plan: of `batch.swapped()`."""
    return _launches(batch.swapped(), plan, processors, dense=True, backward=True)


def _launches(batch: Batch, plan: config.Plan, processors: int, *, dense: bool, backward: bool) -> list[Launch]:
    shrink_tiles = _cdiv(batch.M, plan.SHRINK_M) * _cdiv(batch.z_width, plan.SHRINK_R)
    expand_tiles = _cdiv(batch.M, plan.BLOCK_M) * _cdiv(batch.N, plan.BLOCK_N)
    if plan.once:
        tally = Tally()
        _shrink(tally, batch, plan, dense, backward)
        _expand(tally, batch, plan, backward)
        tiles = shrink_tiles * plan.shrink_splits + expand_tiles * plan.expand_splits
        row_blocks = _cdiv(batch.M, plan.BLOCK_M)
        # an atomic for: each tile drawn; the last, vain draw of each block that stays; each block that leaves; each
        # complete shrink tile published; each complete expand tile's wait for its rows (or more than one)
        stay = min(tiles, plan.per_processor * processors)
        tally.atomics["counters"] += tiles + (2 * stay or tiles) + shrink_tiles + expand_tiles
        # the last block clears the tickets and the counters of row blocks
        tally.written["counters"] += 4 * (_READY + row_blocks)
        return [_launch(tally, batch, plan, backward, shrink=True, expand=True)]
    found = []
    if shrink_tiles:
        tally = Tally()
        _shrink(tally, batch, plan, dense, backward)
        found.append(_launch(tally, batch, plan, backward, shrink=True, expand=False))
    if expand_tiles:
        tally = Tally()
        _expand(tally, batch, plan, backward)
        found.append(_launch(tally, batch, plan, backward, shrink=False, expand=True))
    return found


def _launch(tally: Tally, batch: Batch, plan: config.Plan, backward: bool, *, shrink: bool, expand: bool) -> Launch:
    """Adds the distinct bytes of the matrices. Entries of tables were marked when they were read."""
    M, K, N, e, a = batch.M, batch.K, batch.N, batch.itemsize, batch.adapter_itemsize
    x, y, z, down, up = _names(backward)
    with_rank = sum(s.rows for s in batch.used if batch.rank(s.id))
    reads = {
        x: (M if expand else with_rank) * K * e,
        "weight": N * K * e,
        "bias": N * e,
        down: batch.used_ranks * K * a,
        up: batch.used_ranks * N * a,
        "bias_A": batch.used_ranks * a,
        "bias_B": len(batch.used) * N * a,
        z: 0 if shrink else batch.rank_rows * 4,
    }
    writes = {y: M * N * e, z: tally.written[z], "partials": tally.written["partials"]}
    writes["counters"] = tally.written["counters"]
    launch = tally.launch("lora_linear_kernel", reads, writes)
    waves_us = _waves_us(batch, plan, shrink=shrink, expand=expand)
    return dataclasses.replace(launch, waves_us=waves_us, overlapped=plan.overlap and not shrink)


def _waves_us(batch: Batch, plan: config.Plan, *, shrink: bool, expand: bool) -> float:
    """Shrink tiles, then the product's tiles, on an H100."""
    product = waves.Product(batch.M, batch.N, batch.K)
    us = 0.0
    if shrink:
        us += config.shrink_us(_call_shape(batch), plan, 90)
    if expand:
        us += waves.triton_us(product, waves.Tiles(plan.BLOCK_M, plan.BLOCK_N, plan.expand_splits), GPU)
    return us


def _names(backward: bool) -> tuple[str, str, str, str, str]:
    """The names of x, y, z, of the factor that x is multiplied with, and of the one that z is multiplied with."""
    return ("dy", "dx", "u", "lora_B", "lora_A") if backward else ("x", "y", "z", "lora_A", "lora_B")


def _shrink(tally: Tally, batch: Batch, plan: config.Plan, dense: bool, backward: bool) -> None:
    e, a = batch.itemsize, batch.adapter_itemsize
    x, _, z, down, _ = _names(backward)
    K, splits = batch.K, plan.shrink_splits
    steps = _steps(K, splits, plan.SHRINK_K)
    dot = 2 * plan.SHRINK_M * plan.SHRINK_R * plan.SHRINK_K * terms(batch.dtype, batch.adapter_dtype)
    entries = (2, 4, 3) if backward else (0, 1)
    for segments in batch.blocks(plan.SHRINK_M):
        block = _Block(batch, segments)
        for first in range(0, batch.z_width, plan.SHRINK_R):
            here = [(s, min(max(batch.rank(s.id) - first, 0), plan.SHRINK_R)) for s in segments]
            wanted = [(s, ranks) for s, ranks in here if ranks]
            if batch.many:
                block.rows_and_ids(tally, plan.SHRINK_M, splits)
                if len(block.owned) > plan.SHRINK_M // 4:
                    rows = sum(s.rows for s, _ in wanted)
                    for s, ranks in wanted:
                        tally.table("rows", 4, [s.id * 4], s.rows * splits)
                        tally.table("pages", 8, block.page(s.id, first, entries), s.rows * splits)
                        tally.read[down] += s.rows * ranks * K * a
                        tally.vector_flops += 2 * s.rows * ranks * K
                    tally.read[x] += rows * K * e
                else:
                    block.walk(tally, splits)
                    for s in block.owned:
                        tally.table("rows", 4, [s.id * 4 + 1], splits)
                    for s, ranks in wanted:
                        tally.table("rows", 4, [s.id * 4], splits)
                        tally.table("pages", 8, block.page(s.id, first, entries), splits)
                        tally.read[x] += s.rows * K * e
                        tally.read[down] += ranks * K * a
                        tally.flops += dot * steps
            else:
                tally.read[x] += block.size * K * e
                tally.read[down] += min(max(batch.ranks[0] - first, 0), plan.SHRINK_R) * K * a
                tally.flops += dot * steps
            if splits > 1:
                _sum_of_splits(tally, plan.SHRINK_M * plan.SHRINK_R * 4, splits)
            values = sum(s.rows * ranks for s, ranks in wanted)
            if batch.many and backward:
                for s in block.owned:
                    tally.table("rows", 4, [s.id * 4 + 2], s.rows)
            elif batch.many:
                for s in block.owned:
                    tally.table("biases", 8, [s.id * 2], s.rows)
                tally.read["bias_A"] += values * a * batch.adapter_biases
            elif not backward:
                tally.read["bias_A"] += here[0][1] * a * batch.adapter_biases
            tally.written[z] += 4 * (block.size * min(plan.SHRINK_R, batch.z_width - first) if dense else values)


def _expand(tally: Tally, batch: Batch, plan: config.Plan, backward: bool) -> None:
    K, N, e, a = batch.K, batch.N, batch.itemsize, batch.adapter_itemsize
    x, y, z, _, up = _names(backward)
    columns, splits = _cdiv(N, plan.BLOCK_N), plan.expand_splits
    steps = _steps(K, splits, plan.BLOCK_K)
    dot = 2 * plan.BLOCK_M * plan.BLOCK_N * terms(batch.dtype, batch.dtype) * plan.BLOCK_K
    ieee = batch.dtype == torch.float32
    dot_v = 2 * plan.BLOCK_M * PAGE * plan.BLOCK_N * (1 if ieee else _V_PRODUCTS[batch.adapter_dtype])
    for segments in batch.blocks(plan.BLOCK_M):
        block = _Block(batch, segments)
        # a descriptor reads nothing beyond the tensor; a load reads the last row again
        exact = plan.descriptors and not batch.many
        tally.read[x] += columns * (block.size if exact else plan.BLOCK_M) * K * e
        tally.read["weight"] += (N if plan.descriptors else columns * plan.BLOCK_N) * K * e
        tally.flops += columns * dot * steps
        if splits > 1:
            _sum_of_splits(tally, plan.BLOCK_M * plan.BLOCK_N * 4, splits, columns)
        tally.read["bias"] += N * e * batch.bias
        if batch.many:
            block.order(tally, plan.BLOCK_M, columns * splits)
            _expand_many(tally, batch, plan, block, columns, dot_v, backward)
        else:
            tally.read[z] += columns * block.size * batch.ranks[0] * 4
            tally.read[up] += batch.ranks[0] * N * a
            tally.flops += columns * _cdiv(batch.ranks[0], PAGE) * dot_v
            tally.read["bias_B"] += N * a * (batch.adapter_biases and not backward)
        tally.written[y] += block.size * N * e


def _expand_many(
    tally: Tally, batch: Batch, plan: config.Plan, block: _Block, columns: int, dot_v: int, backward: bool
) -> None:
    N, a = batch.N, batch.adapter_itemsize
    _, _, z, _, up = _names(backward)
    entries = (0, 1) if backward else (2, 3, 4)
    beta = batch.adapter_biases and not backward
    ranks = {s.id: batch.rank(s.id) for s in block.owned}
    largest = max(ranks.values(), default=0)
    by_row = False
    block.first_segment(tally, columns)
    if plan.BY_ROW:
        block.ids(tally, columns)
        dots = sum(max(_cdiv(rank, PAGE), 1) for rank in ranks.values())
        by_row = largest < 2 * (dots - 1)
    if by_row:
        for s in block.owned:
            rank = ranks[s.id]
            tally.table("rows", 4, [s.id * 4], s.rows * columns)
            tally.table("scaling", 4, [s.id], s.rows * columns)
            if not backward:
                tally.table("rows", 4, [s.id * 4 + 2], s.rows * largest * columns)
                tally.table("biases", 8, [s.id * 2 + 1], s.rows * columns)
            for first in range(0, rank, PAGE):
                tally.table("pages", 8, block.page(s.id, first, entries), s.rows * columns)
            tally.read[z] += columns * s.rows * rank * 4
            tally.read[up] += s.rows * rank * N * a
            tally.vector_flops += 2 * s.rows * rank * N
            tally.read["bias_B"] += s.rows * N * a * beta
    else:
        block.rest_of_walk(tally, columns)
        for s in block.owned:
            rank = ranks[s.id]
            tally.table("rows", 4, [s.id * 4, s.id * 4 + 1, s.id * 4 + 2], columns)
            tally.table("scaling", 4, [s.id], columns)
            tally.table("biases", 8, [s.id * 2 + 1], columns)
            for first in range(0, rank, PAGE):
                tally.table("pages", 8, block.page(s.id, first, entries), columns)
            tally.read[z] += columns * s.rows * rank * 4
            tally.read[up] += rank * N * a
            tally.flops += columns * _cdiv(rank, PAGE) * dot_v
            tally.read["bias_B"] += N * a * beta


class _Block:
    """A block of sorted rows, and the table entries that its tiles read."""

    def __init__(self, batch: Batch, segments: list[Segment]) -> None:
        self.batch, self.segments, self.place = batch, segments, segments[0].start
        self.size = sum(s.rows for s in segments)
        self.owned = [s for s in segments if s.id >= 0]
        # the index of the first segment in the batch
        self.segment = [s.id for s in batch.segments()].index(segments[0].id)

    def order(self, tally: Tally, height: int, times: int) -> None:
        places = [min(self.place + i, self.batch.M - 1) for i in range(height)]
        tally.table("order", 8, places, times)

    def rows_and_ids(self, tally: Tally, height: int, times: int) -> None:
        self.order(tally, height, times)
        self.ids(tally, times)

    def ids(self, tally: Tally, times: int) -> None:
        """The ids and ranks of the rows; for each row with an adapter but the first, also the id before it."""
        tally.table("ids", 4, range(self.place, self.place + self.size), times)
        base = self.size - sum(s.rows for s in self.owned)
        tally.table("ids", 4, range(self.place + max(base, 1) - 1, self.place + self.size - 1), times)
        for s in self.owned:
            tally.table("rows", 4, [s.id * 4 + 1], s.rows * times)

    def first_segment(self, tally: Tally, times: int) -> None:
        tally.table("blocks", 4, [self.place // 16], times)
        tally.table("starts", 4, [self.segment], times)

    def rest_of_walk(self, tally: Tally, times: int) -> None:
        many = range(self.segment, self.segment + len(self.segments))
        tally.table("owners", 4, many, times)
        tally.table("starts", 4, [segment + 1 for segment in many], times)

    def walk(self, tally: Tally, times: int) -> None:
        self.first_segment(tally, times)
        self.rest_of_walk(tally, times)

    def page(self, id: int, first: int, entries: tuple[int, ...]) -> list[int]:
        pages_before = sum(_cdiv(rank, PAGE) for rank in self.batch.ranks[:id])
        return [(pages_before + first // PAGE) * 5 + entry for entry in entries]


def _sum_of_splits(tally: Tally, size: int, splits: int, tiles: int = 1) -> None:
    """Every split writes its partial sum; the last one reads them all and clears the counter."""
    tally.written["partials"] += tiles * splits * size
    tally.read["partials"] += tiles * splits * size
    tally.atomics["counters"] += tiles * splits
    tally.written["counters"] += tiles * 4


def _steps(K: int, splits: int, block_k: int) -> int:
    """The total number of steps of block_k over all splits."""
    per_split = _cdiv(_cdiv(K, splits), block_k) * block_k
    return sum(_cdiv(min(per_split, max(K - split * per_split, 0)), block_k) for split in range(splits))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
