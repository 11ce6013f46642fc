"""Three tiers of tests: `default` is what every run has, `full` what `make test-full` adds; `long` takes hours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

FULL, LONG = pytest.mark.full, pytest.mark.long
# To run the tiers of other files: what pytest's -m takes for each.
MARKERS = {"default": "not full and not long", "full": "full", "long": "long"}
TIERS = ["default", pytest.param("full", marks=FULL), pytest.param("long", marks=LONG)]


def spread(cases: Iterable[Any], *, default: int, full: int) -> list[Any]:
    """Parameters: `default` of the cases in every run, `full` more in the full one, evenly spread; the rest is long.

    A case that is a plain tuple has a value for each of several arguments.
    """
    cases = list(cases)
    numbers = list(range(len(cases)))
    chosen = evenly(numbers, default)
    more = evenly([number for number in numbers if number not in chosen], full)
    marks = {number: () for number in chosen} | {number: (FULL,) for number in more}
    return [
        pytest.param(*(case if type(case) is tuple else (case,)), marks=marks.get(number, (LONG,)))
        for number, case in enumerate(cases)
    ]


def evenly(numbers: list[int], count: int) -> list[int]:
    """`count` of them, or all; the first among them."""
    count = min(count, len(numbers))
    return [numbers[i * len(numbers) // count] for i in range(count)]
