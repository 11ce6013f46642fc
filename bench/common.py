"""Runs the measurements of `peftk.tools.benchmark` under pytest-benchmark. Each side of a shape is a benchmark, and the
sides of one shape form a group.

    pytest bench --benchmark-autosave          # and again after a change, then
    pytest-benchmark compare --group-by=fullname

Each side runs alone here, so compare a side only with itself in a different run. `peftk bench` measures ratios between
sides, which take turns there. Every side is checked against fp64 arithmetic before it is timed.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch

from peftk.tools.benchmark.common import Case, Shape, side_names
from peftk.tools.benchmark.run import MODULES, Options, rows

SECONDS = 0.3
ROUNDS = (3, 200)


def sides(op: str) -> list[Any]:
    """pytest parameters (shape, name of a side) for the default rows of an op."""
    return [
        pytest.param(shape, side, id=f"{shape} {side}".replace(" ", "-"))
        for shape, _ in rows(Options(ops=(op,)))
        for side in side_names(shape, "cpu", ())
    ]


def bench(benchmark: Any, shape: Shape, name: str) -> None:
    case = _case(shape)
    side = next(side for side in case.sides if side.name == name)
    benchmark.group = str(shape)
    benchmark.name = f"{shape} {name}"
    with torch.inference_mode(case.inference):
        assert side.error() <= 1.0, "wrong result: not timed"
        side.reset()
        started = time.perf_counter()
        side.run()
        rounds = int(SECONDS / max(time.perf_counter() - started, 1e-6))
        side.reset()
        # one run per round, so that the state can be reset before the next
        benchmark.pedantic(side.run, teardown=side.reset, rounds=min(max(rounds, ROUNDS[0]), ROUNDS[1]))


@functools.lru_cache(maxsize=1)
def _case(shape: Shape) -> Case:
    """Caches the last case, because the sides of a shape run one after another."""
    return MODULES[shape.op].case(shape, "cpu", ())
