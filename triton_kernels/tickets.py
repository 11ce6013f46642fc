"""The protocol of a ticketed launch: who works on what, who waits for whom, who cleans up.

`docs/protocol.md` argues it.

The counters of a launch are int32, zero before it and zero after it:

    [0]                   tickets drawn
    [1]                   blocks that have left
    [2 … 2 + row blocks)  shrink tiles of the row block that are complete
    then                  arrivals at every tile that is cut into splits, one counter a tile

`tl.debug_barrier` (bar.sync) stands between the stores of a block's threads and the release by one of them, and between
an acquire by one of them and the loads of all.
"""

import triton
import triton.language as tl

TICKETS = tl.constexpr(0)
LEFT = tl.constexpr(1)
READY = tl.constexpr(2)


@triton.jit
def draw(counters):
    """The next ticket. Whoever drew a smaller one has started: a tile may wait for tiles with smaller tickets."""
    return tl.atomic_add(counters + TICKETS, 1, sem="relaxed")


@triton.jit
def publish(counters, row_block):
    """What this block has stored is seen by whoever waits for the row block."""
    tl.debug_barrier()
    tl.atomic_add(counters + READY + row_block, 1, sem="release")


@triton.jit
def wait_for(counters, row_block, tiles):
    """Until `tiles` tiles of the row block have been published."""
    while tl.atomic_add(counters + READY + row_block, 0, sem="acquire") < tiles:
        pass
    tl.debug_barrier()


@triton.jit
def sum_of_splits(part, partials, tile, split, splits, arrivals):
    """(the sum of a tile's parts in ascending order, True) for the last of its splits to arrive; (…, False) before."""
    rows: tl.constexpr = part.shape[0]
    columns: tl.constexpr = part.shape[1]
    place = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    parts = partials + tile.to(tl.int64) * splits * (rows * columns)
    tl.store(parts + split * (rows * columns) + place, part)
    tl.debug_barrier()
    last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == splits - 1
    if last:
        tl.debug_barrier()
        part = tl.load(parts + place)
        for other in tl.range(1, splits, num_stages=1):
            part += tl.load(parts + other * (rows * columns) + place)
        tl.store(arrivals + tile, 0)
    return part, last


@triton.jit
def leave(counters, row_blocks):
    """Counts this block out; the last one leaves tickets and row blocks at zero for the next launch."""
    tl.debug_barrier()
    if tl.atomic_add(counters + LEFT, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for start in tl.range(0, row_blocks + READY, 128, num_stages=1):
            counter = start + tl.arange(0, 128)
            tl.store(counters + counter, 0, mask=counter < row_blocks + READY)
