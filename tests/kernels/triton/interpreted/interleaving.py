"""Small kernels with a protocol between programs, in many interleavings, and mutants of them, which must be found."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support import ticketed
from tests.support.interleaving import HangError, Outcome, Schedule, interleaved, outcome, schedules
from tests.support.mutants import mutant

SCHEDULES = schedules(30)


def uneven(*shape: int) -> Tensor:
    """Numbers whose sum depends on the order."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*shape, generator=generator) * 10.0 ** torch.randint(-4, 5, shape, generator=generator)


X_RELAY = uneven(ticketed.GROUPS, ticketed.PARTS, ticketed.BLOCK)
X_SPLIT = uneven(ticketed.TILES, ticketed.SPLITS, 2, ticketed.BLOCK)


def relay(schedule: Schedule) -> Outcome:
    counters = torch.zeros(2 + ticketed.GROUPS, dtype=torch.int32)
    return outcome(
        schedule, lambda: [ticketed.relay(X_RELAY, counters)], [ticketed.expected_relay(X_RELAY)], lambda: counters
    )


def split_sum(schedule: Schedule) -> Outcome:
    counters = torch.zeros(2 * ticketed.TILES, dtype=torch.int32)  # the second half is for a mutant
    return outcome(
        schedule,
        lambda: [ticketed.split_sum(X_SPLIT, counters)],
        [ticketed.expected_split_sum(X_SPLIT)],
        lambda: counters,
    )


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.full)])
@pytest.mark.parametrize("run", [relay, split_sum])
def test_right_in_every_schedule(run: Callable[[Schedule], Outcome], count: int) -> None:
    outcomes = [run(schedule) for schedule in schedules(count)]
    assert [o.verdict for o in outcomes] == ["right"] * count
    assert all(len(o.turns) > 3 * len(set(o.turns)) for o in outcomes)
    assert (sum(o.polls for o in outcomes) > 10 * count) == (run is relay)


RELEASE = """\
        tl.atomic_add(ready + ticket // parts, 1, sem="release")
"""
LAST_OUT = 'if tl.atomic_add(counters + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:'
BARRIER = "tl.debug_barrier()\n    "
ARRIVAL = 'if tl.atomic_add(counters + tile, 1, sem="acq_rel") == splits - 1:'
IN_ORDER_OF_ARRIVAL = (
    (
        "    place = split",
        "    last = counters + tl.num_programs(0) // splits + tile\n    place = tl.atomic_add(last, 1)",
    ),
    ("tl.store(counters + tile, 0)", "tl.store(counters + tile, 0)\n        tl.store(last, 0)"),
)

# name: (kernel, the verdict of some schedule, changes of the source)
MUTANTS: dict[str, tuple[Callable[[Schedule], Outcome], str, tuple[tuple[str, str], ...]]] = {
    "block id for ticket": (
        relay,
        "hang",
        (("ticket = tl.atomic_add", "ticket = tl.program_id(0) + 0 * tl.atomic_add"),),
    ),
    "no release": (relay, "wrong", (('sem="release"', 'sem="relaxed"'),)),
    "no acquire": (relay, "wrong", (('sem="acquire"', 'sem="relaxed"'),)),
    "released to its own block": (relay, "wrong", (('sem="release"', 'sem="release", scope="cta"'),)),
    "no barrier before the release": (relay, "wrong", (("        tl.debug_barrier()\n" + RELEASE, RELEASE),)),
    "released before it is stored": (
        relay,
        "wrong",
        ((RELEASE, ""), ("        tl.store(z", RELEASE + "        tl.store(z")),
    ),
    "released to another group": (relay, "wrong", (("ready + ticket // parts", "ready + ticket % groups"),)),
    "waits for one more": (relay, "hang", (('sem="acquire") < parts', 'sem="acquire") < parts + 1'),)),
    "waits for one less": (relay, "wrong", (('sem="acquire") < parts', 'sem="acquire") < parts - 1'),)),
    "reset by the first out": (relay, "wrong", ((LAST_OUT, LAST_OUT.replace("tl.num_programs(0) - 1", "0")),)),
    "reset by the last but one": (relay, "hang", ((LAST_OUT, LAST_OUT.replace("- 1", "- 2")),)),
    "one counter is not reset": (relay, "not reset", (("tl.store(ready + group, 0)", "pass"),)),
    "counted out in no order": (relay, "race", ((LAST_OUT, LAST_OUT.replace("acq_rel", "relaxed")),)),
    "only producers count out": (
        relay,
        "hang",
        ((LAST_OUT, LAST_OUT.replace("if ", "if ticket < 12 and ").replace("tl.num_programs(0)", "12")),),
    ),
    "partials not released": (split_sum, "wrong", ((ARRIVAL, ARRIVAL.replace("acq_rel", "acquire")),)),
    "partials not acquired": (split_sum, "wrong", ((ARRIVAL, ARRIVAL.replace("acq_rel", "release")),)),
    "no barrier before the arrival": (split_sum, "wrong", ((BARRIER + ARRIVAL, ARRIVAL),)),
    "the last but one sums": (split_sum, "wrong", ((ARRIVAL, ARRIVAL.replace("- 1", "- 2")),)),
    "the last split sums": (
        split_sum,
        "wrong",
        ((ARRIVAL, ARRIVAL[3:].split(" ==")[0] + "\n    if split == splits - 1:"),),
    ),
    "summed in the order of arrival": (split_sum, "wrong", IN_ORDER_OF_ARRIVAL),
}


@pytest.mark.parametrize("name", list(MUTANTS))
def test_mutants_are_found(name: str) -> None:
    run, expected, changes = MUTANTS[name]
    with mutant(ticketed, *changes):
        assert any(run(schedule).verdict == expected for schedule in SCHEDULES)


def test_a_sum_in_the_order_of_arrival_differs_between_schedules() -> None:
    def bits() -> set[bytes]:
        return {split_sum(schedule).results[0][0].numpy().tobytes() for schedule in SCHEDULES[:10]}

    assert len(bits()) == 1
    with mutant(ticketed, *IN_ORDER_OF_ARRIVAL):
        assert len(bits()) > 1


def test_mutation_alone_changes_nothing() -> None:
    original = ticketed.relay_kernel
    with mutant(ticketed, ("ready = counters + 2", "ready = counters + 1 + 1")):
        assert ticketed.relay_kernel is not original
        assert [o.verdict for o in map(relay, SCHEDULES[:4])] == ["right"] * 4
    assert ticketed.relay_kernel is original
    with pytest.raises(AssertionError, match="0 times"), mutant(ticketed, ("not there", "")):
        pass


def test_the_same_schedule_gives_the_same_run() -> None:
    first, again = relay(SCHEDULES[5]), relay(SCHEDULES[5])
    assert first.turns == again.turns
    assert first.turns != relay(SCHEDULES[5]._replace(seed=99)).turns


def test_a_hang_says_where_and_leaves_nothing_behind() -> None:
    threads = threading.active_count()
    counters = torch.zeros(2 + ticketed.GROUPS, dtype=torch.int32)
    changes = MUTANTS["block id for ticket"][2]
    with (
        mutant(ticketed, *changes),
        pytest.raises(HangError, match=r"seed=3.* polls counters\[\d\].* have not started"),
        interleaved(Schedule(seed=3, resident=2)),
    ):
        ticketed.relay(X_RELAY, counters)
    assert threading.active_count() == threads
    assert relay(Schedule(seed=3, resident=2)).verdict == "right"
    assert torch.equal(ticketed.relay(X_RELAY, torch.zeros_like(counters)), ticketed.expected_relay(X_RELAY))


def test_an_error_in_a_program_ends_the_launch() -> None:
    threads = threading.active_count()
    with (
        mutant(ticketed, ("tile = ticket - groups * parts", "tile = ticket - not_there")),
        pytest.raises(NameError, match="not_there"),
    ):
        relay(SCHEDULES[0])
    assert threading.active_count() == threads
