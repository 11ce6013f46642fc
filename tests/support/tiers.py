"""Three tiers of tests: `default` is what every run has, `full` what `make test-full` adds; `long` takes hours."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from typing import Any

import pytest

GOLDEN_RATIO = (5**0.5 - 1) / 2
FULL, LONG = pytest.mark.full, pytest.mark.long
# For files that run in a process of their own: what its -m takes for each.
MARKERS = {"default": "not full and not long", "full": "full", "long": "long"}
TIERS = ["default", pytest.param("full", marks=FULL), pytest.param("long", marks=LONG)]


def spread(cases: Iterable[Any], *, default: int, full: int | None = None) -> list[Any]:
    """Parameters: `default` of the cases in every run, `full` more, or all, in the full one; the rest is long.

    The first is among the default ones; the others lie evenly, in the order of multiples of the golden ratio, with
    which no argument of a product keeps step. A plain tuple has a value for each of several arguments.
    """
    cases = list(cases)
    drawn = sorted(range(len(cases)), key=lambda number: number * GOLDEN_RATIO % 1)
    last = len(cases) if full is None else default + full
    marks = {number: () for number in drawn[:default]} | {number: (FULL,) for number in drawn[default:last]}
    return [
        pytest.param(*(case if type(case) is tuple else (case,)), marks=marks.get(number, (LONG,)))
        for number, case in enumerate(cases)
    ]


def judge(done: subprocess.CompletedProcess[str], tier: str) -> None:
    """What a pytest process that ran a tier of some files has to say: skips where they have nothing of the tier."""
    if tier != "default" and done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(f"no {tier} tests in these files")
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-20000:]}"
    assert " passed" in done.stdout
