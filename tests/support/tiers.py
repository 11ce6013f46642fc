"""Three tiers of tests: `default` runs always, `full` is what `make test-full` adds, `long` takes hours."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from typing import Any

import pytest

GOLDEN_RATIO = (5**0.5 - 1) / 2
FULL, LONG = pytest.mark.full, pytest.mark.long
# For files that run in a separate process: its -m argument for each tier.
MARKERS = {"default": "not full and not long", "full": "full", "long": "long"}
TIERS = ["default", pytest.param("full", marks=FULL), pytest.param("long", marks=LONG)]


def spread(cases: Iterable[Any], *, default: int, full: int | None = None) -> list[Any]:
    """Parameters: `default` cases in every run, `full` more (or all) in the full tier, and the rest in the long one.

    The first case is among the default ones. The others are spread evenly by multiples of the golden ratio, which are
    out of step with the arguments of a product. A plain tuple has a value for each of several arguments.
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
    """Passes if a pytest process that ran a tier of some files passed; skips if the files have no such tests."""
    if tier != "default" and done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(f"no {tier} tests in these files")
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-20000:]}"
    assert " passed" in done.stdout
