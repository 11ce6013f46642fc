"""Asks an engine as clients do, and keeps the time of every token."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence

from peftk.serve import Engine, Request
from peftk.tools.benchmark.serving.traffic import Job, tokens

PERCENTILES = (50, 95, 99)


@dataclasses.dataclass(frozen=True)
class Served:
    """Times in seconds: of all, of a request's first token, and between two tokens of one request."""

    seconds: float
    new_tokens: int
    first_token: tuple[float, ...]
    between_tokens: tuple[float, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in ms; none of nothing."""
    if len(seconds) < 2:
        return {f"p{p}": 1e3 * second for p in PERCENTILES for second in seconds}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}": 1e3 * cuts[p - 1] for p in PERCENTILES}


def closed_loop(engine: Engine, jobs: Sequence[Job], clients: int) -> Served:
    """`clients` that each ask for a job when their last one is answered."""
    return asyncio.run(_drive(engine, jobs, [0.0] * len(jobs), clients))


def open_loop(engine: Engine, jobs: Sequence[Job], arrivals: Sequence[float]) -> Served:
    """Jobs that come at these seconds, whatever has been answered. First tokens count from there."""
    return asyncio.run(_drive(engine, jobs, arrivals, len(jobs)))


async def _drive(engine: Engine, jobs: Sequence[Job], arrivals: Sequence[float], clients: int) -> Served:
    free = asyncio.Semaphore(clients)
    times: list[list[float]] = [[] for _ in jobs]
    answers: list[list[int]] = [[] for _ in jobs]
    began = time.perf_counter()

    async def ask(number: int) -> None:
        job = jobs[number]
        await asyncio.sleep(max(0.0, began + arrivals[number] - time.perf_counter()))
        async with free:
            # of a closed loop a request begins when a client is free
            times[number].append(began + arrivals[number] if clients == len(jobs) else time.perf_counter())
            async for token in engine.stream(
                Request(job.prompt, job.adapter, job.new_tokens, ignore_eos=True, tenant="all")
            ):
                if token.id is not None:
                    times[number].append(time.perf_counter())
                    answers[number].append(token.id)

    await asyncio.gather(*map(ask, range(len(jobs))))
    return Served(
        seconds=time.perf_counter() - began,
        new_tokens=tokens(jobs),
        first_token=tuple(one[1] - one[0] for one in times),
        between_tokens=tuple(b - a for one in times for a, b in itertools.pairwise(one[1:])),
        answers=tuple(map(tuple, answers)),
    )
