"""Timing side by side: every repetition runs each side once, in rotating order, and the median counts.

A noisy machine slows all sides of a repetition alike, so ratios of medians hold where absolute times do not.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

Run = Callable[[], object]


class Times(NamedTuple):
    """What one side took, in µs."""

    median_us: float
    p10_us: float
    p90_us: float
    repeats: int


def interleave(
    sides: Mapping[str, Run],
    *,
    seconds: float,
    repeats: int = 1000,
    reset: Mapping[str, Run] | None = None,
    synchronize: Run | None = None,
) -> dict[str, Times]:
    """Times all sides together for about `seconds`, or `repeats` repetitions if those come first.

    Each side first runs once untimed. There are three repetitions or more, but only one where that alone takes longer
    than `seconds`. reset: per side, what brings its state back after a run, not timed. synchronize: waits for the
    device, so that the work is timed and not its launch.
    """
    names = list(sides)
    wait = synchronize or _nothing
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
                run = sides[name]
                wait()
                before = time.perf_counter_ns()
                run()
                wait()
                samples[name].append((time.perf_counter_ns() - before) / 1000)
                restore[name]()
            spent = time.perf_counter() - started
            if spent > seconds and (repetition >= 2 or repetition == 0):
                break
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(samples[name]) for name in names}


def _summary(samples: list[float]) -> Times:
    if len(samples) == 1:
        return Times(samples[0], samples[0], samples[0], 1)
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Times(statistics.median(samples), deciles[0], deciles[-1], len(samples))


def _nothing() -> None:
    pass
