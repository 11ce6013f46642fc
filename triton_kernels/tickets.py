"""The protocol of a ticketed launch: which block works on which tile, waits for which, and resets the counters.

`docs/protocol.md` explains why it is correct.

The counters of a launch are int32, and zero before and after it:

    [0]                   tickets drawn
    [1]                   blocks that have left
    [2 … 2 + row blocks)  complete shrink tiles, per row block
    then                  arrivals at each tile that is split, one counter per tile

There is a `tl.debug_barrier` (bar.sync) between the stores of a block's threads and the release by one of them, and
between an acquire by one thread and the loads of all.

Two launches that overlap draw no tickets: the second one waits for the whole first one.
"""

import triton
import triton.language as tl

from .arithmetic import INTERPRETED

if INTERPRETED.value:  # launches follow each other

    def gdc_launch_dependents() -> None:
        pass

    def gdc_wait() -> None:
        pass

else:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TICKETS = tl.constexpr(0)
LEFT = tl.constexpr(1)
READY = tl.constexpr(2)


@triton.jit
def draw_ticket(counters):
    """The next ticket. Blocks with smaller tickets have started, so a tile may wait for tiles with smaller tickets."""
    return tl.atomic_add(counters + TICKETS, 1, sem="relaxed")


@triton.jit
def publish(counters, row_block):
    """Counts a tile of the row block as complete, and makes this block's stores visible to blocks that wait for it."""
    tl.debug_barrier()
    tl.atomic_add(counters + READY + row_block, 1, sem="release")


@triton.jit
def wait_for(counters, row_block, tiles):
    """Waits until `tiles` tiles of the row block have been published."""
    while tl.atomic_add(counters + READY + row_block, 0, sem="acquire") < tiles:
        pass
    tl.debug_barrier()


@triton.jit
def sum_of_splits(part, partials, tile, split, splits, arrivals):
    """(sum of a tile's parts in ascending order, True) in the last split to arrive; (part, False) in the others."""
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
def let_next_launch_begin():
    """From when all blocks of this launch have said so, or have ended, blocks of the next one may start."""
    gdc_launch_dependents()


@triton.jit
def wait_for_launch_before():
    """Waits until the launch before this one has ended. All of its stores are then visible to all threads."""
    gdc_wait()


@triton.jit
def leave(counters, row_blocks):
    """Counts this block as finished. The last one resets tickets and row blocks to zero for the next launch."""
    tl.debug_barrier()
    if tl.atomic_add(counters + LEFT, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for start in tl.range(0, row_blocks + READY, 128, num_stages=1):
            counter = start + tl.arange(0, 128)
            tl.store(counters + counter, 0, mask=counter < row_blocks + READY)
