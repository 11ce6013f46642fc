"""Counts the work of the launch of `triton_kernels/lora_wgrad.py` in closed form: dA and dB of all adapters."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.counted.batch import Batch, terms
from bench.counted.tally import Tally
from bench.counted.work import Launch
from peftk.adapters.adapter import PAGE
from peftk.triton_kernels import config


class Tiling(NamedTuple):
    block: config.Wgrad
    heads: int  # pieces of ranks, over all adapters
    groups: int  # the maximum number of pieces of an adapter
    blocks_A: int
    blocks: int  # of columns
    range_rows: int


def tiling(batch: Batch, target: int | str, *, wide: bool = True) -> Tiling:
    """The tiling that the launcher chooses for this batch, if all dA and dB are wanted and no gradient of a bias."""
    pages = config.wgrad_pages(max(batch.ranks), batch.dtype, target)
    block = config.wgrad(pages, batch.many, wide, batch.dtype, target)
    pieces = [_cdiv(_cdiv(rank, PAGE), pages) for rank in batch.ranks]
    blocks_A = _cdiv(batch.K, block.BLOCK_C)
    blocks = blocks_A + _cdiv(batch.N, block.BLOCK_C)
    heads, groups = sum(pieces), max(pieces)
    range_rows = config.wgrad_range(batch.M, heads, groups, blocks, block)
    return Tiling(block, heads, groups, blocks_A, blocks, range_rows)


def wgrad(batch: Batch, tiling: Tiling) -> list[Launch]:
    block, _, _, blocks_A, blocks, range_rows = tiling
    tally = Tally()
    height = block.PAGES * PAGE  # ranks of a tile
    partial = (height + 1) * block.BLOCK_C * 4
    dot = 2 * height * block.BLOCK_R * block.BLOCK_C * terms(torch.float32, batch.dtype)
    e, a = batch.itemsize, batch.adapter_itemsize
    if batch.many:
        _further_ranges(tally, batch, tiling)
    first_task = 0
    for id, rank in enumerate(batch.ranks):
        start, end = _ends(batch, id)
        ranges = max(_cdiv(end - start, range_rows), 1)
        for group in range(_cdiv(_cdiv(rank, PAGE), block.PAGES)):
            ranks = min(rank - group * height, height)
            if batch.many:
                # for all ranges, and for range starts in these rows that turn out not to begin a range
                _task(tally, id, first_task, blocks * (1 + _boundaries(batch, tiling, id)))
            for number in range(ranges):
                first = start + number * range_rows
                last = min(first + range_rows, end)
                for at in range(first, last, block.BLOCK_R):
                    if batch.many:
                        places = [min(at + i, batch.M - 1) for i in range(block.BLOCK_R)]
                        tally.table("order", 8, places, blocks)
                    tally.flops += blocks * dot
                rows = max(last - first, 0)
                tally.read["u"] += blocks_A * rows * ranks * 4
                tally.read["z"] += (blocks - blocks_A) * rows * ranks * 4
                tally.read["x"] += rows * batch.K * e
                tally.read["dy"] += rows * batch.N * e
            if ranges > 1:
                tally.written["partials"] += ranges * blocks * partial
                tally.read["partials"] += ranges * blocks * partial
                tally.atomics["counters"] += ranges * blocks
                tally.written["counters"] += blocks * 4
            tally.written["dA"] += ranks * batch.K * a
            tally.written["dB"] += ranks * batch.N * a
            first_task += 1
    rows = sum(s.rows for s in batch.used if batch.rank(s.id))
    reads = {
        "x": rows * batch.K * e,
        "dy": rows * batch.N * e,
        "u": batch.rank_rows * 4,
        "z": batch.rank_rows * 4,
    }
    return [tally.launch("wgrad_kernel", reads, dict(tally.written))]


def _further_ranges(tally: Tally, batch: Batch, tiling: Tiling) -> None:
    """Every program after the heads looks up the adapter of the row where its range starts."""
    for boundary in range(1, _cdiv(batch.M, tiling.range_rows)):
        times = tiling.groups * tiling.blocks
        place = boundary * tiling.range_rows
        tally.table("ids", 4, [place], times)
        owner = next((s.id for s in batch.used if s.start <= place < s.start + s.rows), None)
        if owner is not None:
            tally.table("firsts", 4, [owner * 2, owner * 2 + 1], times)


def _boundaries(batch: Batch, tiling: Tiling, id: int) -> int:
    """The number of multiples of range_rows, without 0, among the sorted places of the adapter's rows."""
    start, end = _ends(batch, id)
    size = tiling.range_rows
    return (end - 1) // size - max(start - 1, 0) // size if end > start else 0


def _ends(batch: Batch, id: int) -> tuple[int, int]:
    """The sorted places of an adapter's rows: the first, and one past the last."""
    return next(((s.start, s.start + s.rows) for s in batch.used if s.id == id), (0, 0))


def _task(tally: Tally, id: int, task: int, times: int) -> None:
    tally.table("tasks", 4, range(task * 9, task * 9 + 8), times)
    tally.table("rows", 4, [id * 4 + 1, id * 4 + 2], times)
    tally.table("scalings", 4, [id], times)
    tally.table("ends", 4, [id, id + 1], times)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
