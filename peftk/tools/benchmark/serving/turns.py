"""Times sides in turns: in each round every side answers the same jobs once. Wall time and processor time, medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

Answer = Callable[[], object]


class Timed(NamedTuple):
    """A side with its jobs. processor: as `Side.processor`."""

    answer: Answer
    processor: Callable[[], float] = time.process_time


class Rate(NamedTuple):
    """Tokens in a second of wall time, and in one of processor time of the process that answers, all threads."""

    wall: float
    processor: float


def rates(sides: dict[str, Timed], tokens: int, rounds: int) -> dict[str, list[Rate]]:
    """By side, one for each round. The order of the sides rotates."""
    names = list(sides)
    found: dict[str, list[Rate]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            answer, processor_time = sides[name]
            wall, processor = time.perf_counter(), processor_time()
            answer()
            wall, processor = time.perf_counter() - wall, processor_time() - processor
            found[name].append(Rate(tokens / wall, tokens / processor if processor else math.inf))
    return found


def median(found: Sequence[Rate]) -> Rate:
    return Rate(statistics.median(rate.wall for rate in found), statistics.median(rate.processor for rate in found))
