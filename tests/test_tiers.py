"""How cases are distributed over the three tiers."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from tests.support.tiers import FULL, LONG, judge, spread


def values(cases: list, *marks: object) -> list:
    return [case.values for case in cases if tuple(case.marks) == marks]


def test_every_case_is_in_one_tier() -> None:
    cases = spread(range(80), default=3, full=12)
    assert [case.values for case in cases] == [(number,) for number in range(80)]
    assert [len(values(cases)), len(values(cases, FULL)), len(values(cases, LONG))] == [3, 12, 65]
    assert values(cases)[0] == (0,)
    assert not values(spread(range(80), default=3), LONG)
    assert not values(spread("ab", default=0))
    assert len(values(spread("ab", default=5, full=5))) == 2


def test_no_argument_keeps_step_with_the_choice() -> None:
    for a, b, c in itertools.product((2, 3, 4, 6), repeat=3):
        chosen = values(spread(itertools.product(range(a), range(b), range(c)), default=max(a, b, c) + 2))
        assert all(len(set(argument)) > 1 for argument in zip(*chosen, strict=True)), (a, b, c, chosen)


@pytest.mark.parametrize(
    ("status", "output", "tier", "verdict"),
    [
        (0, "3 passed", "default", None),
        (1, "1 failed, 3 passed", "default", AssertionError),
        (0, "3 skipped", "full", AssertionError),
        (5, "no tests ran", "default", AssertionError),
        (5, "no tests ran", "full", pytest.skip.Exception),
    ],
)
def test_a_tiers_run_is_judged(status: int, output: str, tier: str, verdict: type[BaseException] | None) -> None:
    done = subprocess.CompletedProcess([], status, stdout=output, stderr="")
    if verdict is None:
        judge(done, tier)
    else:
        with pytest.raises(verdict):
            judge(done, tier)
