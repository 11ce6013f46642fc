"""Times several functions side by side: every repetition runs each once, in rotating order. Reports medians.

Noise slows all sides of a repetition alike, so ratios of medians are more stable than absolute times.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Run = Callable[[], object]
Clock = Callable[[Run], float]  # runs it once; returns µs


class Times(NamedTuple):
    """The times of one side, in µs."""

    median_us: float
    p10_us: float
    p90_us: float
    mean_us: float
    repeats: int


def interleave(
    sides: Mapping[str, Run],
    *,
    seconds: float,
    repeats: int = 1000,
    reset: Mapping[str, Run] | None = None,
    synchronize: Run | None = None,
    clock: Clock | None = None,
) -> dict[str, Times]:
    """Times all sides together for about `seconds`, or `repeats` repetitions if those come first.

    Each side first runs once untimed. There are at least three repetitions, or one if that alone takes longer than
    `seconds`. reset: by side, a function that restores its state after each run, not timed. synchronize: waits for the
    device, so that the work is timed and not only its launch. clock: times one run; None: wall time.
    """
    names = list(sides)
    wait = synchronize or _nothing
    time_one = clock or wall(wait)
    restore = {name: (reset or {}).get(name, _nothing) for name in names}
    for name in names:
        sides[name]()
        restore[name]()
    wait()
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for repetition in range(max(repeats, 1)):
            shift = repetition % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(time_one(sides[name]))
                restore[name]()
            spent = time.perf_counter() - started
            if spent > seconds and (repetition >= 2 or repetition == 0):
                break
    finally:
        if collecting:
            gc.enable()
    return {name: summary(samples[name]) for name in names}


def wall(wait: Run) -> Clock:
    """Wall time from the call until `wait` returns."""

    def clock(run: Run) -> float:
        wait()
        before = time.perf_counter_ns()
        run()
        wait()
        return (time.perf_counter_ns() - before) / 1000

    return clock


def cuda_events() -> Clock:
    """GPU time between two events on the current stream.

    Before the first event the GPU overwrites its L2 cache several times. So weights are read from memory, as in a
    model, where other layers run in between. It also keeps the GPU busy until the host has launched the run.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    larger_than_caches = torch.empty(1 << 28, dtype=torch.int8, device="cuda")

    def clock(run: Run) -> float:
        for _ in range(4):
            larger_than_caches.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000

    return clock


def summary(samples: list[float]) -> Times:
    """Of at least one time in µs."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples
    return Times(statistics.median(samples), deciles[0], deciles[-1], statistics.fmean(samples), len(samples))


def _nothing() -> None:
    pass
