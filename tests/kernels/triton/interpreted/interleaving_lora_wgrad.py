"""lora_wgrad's sums over ranges of rows in many interleavings, and mutants of them, which must be found."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from torch import Tensor

from peftk.backends import triton as backend
from peftk.launch import workspace
from peftk.triton_kernels import config, lora_wgrad
from peftk.triton_kernels.segments import segments
from tests.support.interleaving import Outcome, Schedule, outcome, schedules
from tests.support.mutants import mutant
from tests.support.triton_cases import F32, adapter, make
from tests.support.wgrad_cases import Inputs, all_wanted, inputs

M, N, K = 56, 20, 30
IDS = [0] * 20 + [-1] * 3 + [1, 0] * 10 + [0] * 13
SCHEDULES = schedules(12)
MORE_SCHEDULES = schedules(60)  # almost always, one of the first finds a mutant


@pytest.fixture(autouse=True)
def ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of 16 rows: four of them with one adapter, three of adapter 0 of two."""
    monkeypatch.setattr(config, "wgrad_range", lambda *_: 16)


@functools.cache
def given(many: bool) -> Inputs:
    adapters = tuple(adapter(rank, K, N, F32, "identity", rank) for rank in ((5, 18) if many else (5,)))
    return inputs(make((F32, F32, F32), adapters, IDS if many else None, M, K, N))


def launch(many: bool) -> Sequence[Tensor]:
    case = given(many).case
    adapters, order = backend._one_adapter(case.adapters[0])[0], None
    if many:
        adapters, order = backend._build_table_adapters(case.table()), segments(case.ids, len(case.adapters))
    ranks, wanted = [a.rank for a in case.adapters], [all_wanted(a) for a in case.adapters]
    plan = lora_wgrad.plan(ranks, wanted, (0, N), F32, case.x.device, many=many)
    grads = lora_wgrad.wgrad(given(many).dy, case.x, given(many).z, given(many).u, adapters, order, plan)
    return [grad for adapter_grads in grads for grad in adapter_grads]


@functools.cache
def expected(many: bool) -> Sequence[Tensor]:
    return launch(many)


def run(many: bool, schedule: Schedule) -> Outcome:
    device, standard = given(many).dy.device, expected(many)
    workspace.forget(device)
    return outcome(schedule, lambda: launch(many), standard, lambda: workspace._counters(device, 0))


@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.full)])
@pytest.mark.parametrize("many", [False, True])
def test_right_in_every_schedule(many: bool, count: int) -> None:
    outcomes = [run(many, schedule) for schedule in schedules(count)]
    assert [o.verdict for o in outcomes] == ["right"] * len(outcomes)
    assert all(len(o.turns) > len(set(o.turns)) > 4 for o in outcomes)


BARRIER = "        tl.debug_barrier()"
ARRIVED = 'arrived = tl.atomic_add(counter, 1, sem="acq_rel")'

# name: (the verdict of some schedule, changes of the source)
MUTANTS = {
    "partials not released": ("wrong", (ARRIVED, ARRIVED.replace("acq_rel", "acquire"))),
    "partials not acquired": ("wrong", (ARRIVED, ARRIVED.replace("acq_rel", "release"))),
    "no barrier before the arrival": ("wrong", (BARRIER, "")),
    "the last but one sums": ("wrong", ("arrived == ranges - 1", "arrived == ranges - 2")),
    "the last range sums": ("wrong", ("complete = arrived == ranges - 1", "complete = number == ranges - 1")),
    "not reset": ("not reset", ("            tl.store(counter, 0)\n", "")),
    "one place for two ranges": ("wrong", ("tl.where(number > 0, 2 * number + 1, 0)", "tl.where(number > 0, 1, 0)")),
    "summed from the last to arrive on": (
        "wrong",
        ("            acc = tl.load(tile + inside)\n", ""),
        (
            "theirs = tile + (2 * other + 1) * step",
            "at = (number + other) % ranges\n                theirs = tile + tl.where(at > 0, 2 * at + 1, 0) * step",
        ),
    ),
}


@pytest.mark.parametrize("name", list(MUTANTS))
def test_mutants_are_found(name: str) -> None:
    verdict, *changes = MUTANTS[name]
    expected(False)
    with mutant(lora_wgrad, *changes):
        # a value that is read too early may be right by chance; then the verdict is a race
        found = {verdict, "race"} if verdict == "wrong" else {verdict}
        assert any(run(False, schedule).verdict in found for schedule in MORE_SCHEDULES)
