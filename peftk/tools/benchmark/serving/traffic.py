"""What is asked of a server: prompts, adapters by popularity, times of arrival. The same in every run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

UNIFORM, ZIPF, DISTINCT = "uniform", "Zipf", "distinct"
POPULARITIES = (UNIFORM, ZIPF, DISTINCT)


class Job(NamedTuple):
    """A request: ids of tokens, a name of an adapter or None, and how many tokens are to be generated."""

    prompt: tuple[int, ...]
    adapter: str | None
    new_tokens: int


def jobs(
    names: Sequence[str | None], count: int, *, popularity: str, prompt: int, new: int, vocabulary: int
) -> list[Job]:
    """popularity: of the names, in their order. Zipf: with α = 1. distinct: one after the other, each as often.

    Source of Zipf's law for the popularity of adapters: Sheng et al. 2023 (S-LoRA), section 6.
    """
    random_numbers = random.Random(0)
    if popularity == DISTINCT:
        chosen = [names[number % len(names)] for number in range(count)]
    else:
        weights = [1.0 if popularity == UNIFORM else 1 / (place + 1) for place in range(len(names))]
        chosen = random_numbers.choices(names, weights, k=count)
    first = vocabulary // 16  # special tokens and single bytes come first
    return [
        Job(tuple(random_numbers.randrange(first, vocabulary) for _ in range(prompt)), name, new) for name in chosen
    ]


def arrivals(count: int, rate: float) -> list[float]:
    """Seconds at which requests come, on average `rate` in a second: a Poisson process."""
    random_numbers = random.Random(1)
    times, now = [], 0.0
    for _ in range(count):
        now += random_numbers.expovariate(rate)
        times.append(now)
    return times


def without_adapters(asked: Sequence[Job]) -> list[Job]:
    return [job._replace(adapter=None) for job in asked]


def tokens(asked: Sequence[Job]) -> int:
    """How many tokens are generated for all."""
    return sum(job.new_tokens for job in asked)
