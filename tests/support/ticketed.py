"""Two small kernels with the same protocol as the real ones (`docs/protocol.md`), and their launchers.

`tests/kernels/triton/interpreted/interleaving.py` tests `tests.support.interleaving` with them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16
GROUPS, PARTS, TILES, SPLITS = 4, 3, 3, 4


@triton.jit
def relay_kernel(x, z, y, counters, groups, parts, tiles, BLOCK: tl.constexpr):
    """Producers: each writes z = 2x for a part of a group. Consumers: y = (tile + 1) · the sum of the group's parts."""
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    ready = counters + 2
    lane = tl.arange(0, BLOCK)
    if ticket < groups * parts:
        tl.store(z + ticket * BLOCK + lane, 2.0 * tl.load(x + ticket * BLOCK + lane))
        tl.debug_barrier()
        tl.atomic_add(ready + ticket // parts, 1, sem="release")
    else:
        tile = ticket - groups * parts
        group = tile // tiles
        while tl.atomic_add(ready + group, 0, sem="acquire") < parts:
            pass
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            total += tl.load(z + (group * parts + part) * BLOCK + lane)
        tl.store(y + tile * BLOCK + lane, total * (tile + 1))
    if tl.atomic_add(counters + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for group in range(groups):
            tl.store(ready + group, 0)
        tl.store(counters, 0)
        tl.store(counters + 1, 0)


def relay(x: Tensor, counters: Tensor) -> Tensor:
    """x [GROUPS, PARTS, BLOCK] → y [GROUPS · TILES, BLOCK]. counters: int32 [2 + GROUPS], zero before and after."""
    y = torch.empty(GROUPS * TILES, BLOCK)
    relay_kernel[(GROUPS * (PARTS + TILES),)](x, torch.empty_like(x), y, counters, GROUPS, PARTS, TILES, BLOCK=BLOCK)
    return y


def expected_relay(x: Tensor) -> Tensor:
    total = torch.zeros(GROUPS, BLOCK)
    for part in range(PARTS):
        total += 2.0 * x[:, part]
    return total.repeat_interleave(TILES, 0) * torch.arange(1, GROUPS * TILES + 1)[:, None]


@triton.jit
def split_sum_kernel(x, partials, y, counters, splits, per_split, BLOCK: tl.constexpr):
    """y[tile] = the sum of x[tile] over its rows: each program sums a range, the last to arrive sums the ranges."""
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    place = split
    lane = tl.arange(0, BLOCK)
    partial = tl.zeros((BLOCK,), tl.float32)
    for row in range(per_split):
        partial += tl.load(x + ((tile * splits + split) * per_split + row) * BLOCK + lane)
    tl.store(partials + (tile * splits + place) * BLOCK + lane, partial)
    tl.debug_barrier()
    if tl.atomic_add(counters + tile, 1, sem="acq_rel") == splits - 1:
        total = tl.zeros((BLOCK,), tl.float32)
        for other in range(splits):
            total += tl.load(partials + (tile * splits + other) * BLOCK + lane)
        tl.store(y + tile * BLOCK + lane, total)
        tl.store(counters + tile, 0)


def split_sum(x: Tensor, counters: Tensor) -> Tensor:
    """x [TILES, SPLITS, rows, BLOCK] → y [TILES, BLOCK]. counters: int32 [TILES], zero before and after."""
    y = torch.empty(TILES, BLOCK)
    partials = torch.empty(TILES, SPLITS, BLOCK)
    split_sum_kernel[(TILES * SPLITS,)](x, partials, y, counters, SPLITS, x.shape[2], BLOCK=BLOCK)
    return y


def expected_split_sum(x: Tensor) -> Tensor:
    partials = torch.zeros(TILES, SPLITS, BLOCK)
    for row in range(x.shape[2]):
        partials += x[:, :, row]
    total = torch.zeros(TILES, BLOCK)
    for split in range(SPLITS):
        total += partials[:, split]
    return total
