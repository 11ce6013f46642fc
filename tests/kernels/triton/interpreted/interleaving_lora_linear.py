"""lora_linear's launch, forward and backward, in many interleavings, and mutants of its protocol, which must be found.

`lora_linear.py` tests the launch with one program at a time; here those results are the expected ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from peftk.backends import triton as backend
from peftk.launch import workspace
from peftk.triton_kernels import config, expand, lora_linear, tickets, tuned
from peftk.triton_kernels.segments import segments
from tests.support.cases import normal
from tests.support.interleaving import HangError, Outcome, Schedule, interleaved, outcome, schedules
from tests.support.mutants import mutant
from tests.support.tiers import spread
from tests.support.triton_cases import F32, adapter, make

M, N, K = 20, 40, 70  # 2 row blocks, the last one ragged; 2 column blocks, and 3 of dX
SCHEDULES = schedules(12)
MORE_SCHEDULES = schedules(60)  # almost always, one of the first finds a mutant
IDS = [i % 4 - 1 for i in range(9)] + [2] * 11


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that use all of the protocol, with 20 tiles: both kinds of tiles are split."""
    chosen = config.lora_linear
    monkeypatch.setattr(config, "lora_linear", lambda *form: chosen(*form)._replace(shrink_splits=3, expand_splits=2))


@functools.cache
def launches() -> dict[str, Callable[[], Sequence[Tensor]]]:
    """Calls of one launch each, by name."""
    one = make((F32, F32, F32), (adapter(20, K, N, F32, "silu", 3),), None, M, K, N)
    some = tuple(adapter(rank, K, N, F32, "identity", 7 * rank) for rank in (20, 3, 9))
    many = make((F32, F32, F32), some, IDS, M, K, N)
    of_one, held = backend._one_adapter(one.adapters[0])
    of_many, order = backend._build_table_adapters(many.table()), segments(many.ids, 3)
    dy, z = normal(M, N, dtype=F32, seed=5), normal(M, 32, dtype=F32, seed=6)
    seed = torch.tensor([11])

    def backward_one() -> Sequence[Tensor]:
        assert held
        return lora_linear.backward(dy, one.weight, K, of_one, None, z)

    return {
        "one": lambda: lora_linear.forward(one.x, one.weight, one.bias, of_one, None, save_z=bool(held)),
        "many": lambda: lora_linear.forward(many.x, many.weight, many.bias, of_many, order, save_z=True),
        "backward, one": backward_one,
        "backward, many": lambda: lora_linear.backward(
            dy, many.weight, K, of_many, order, z, dropout_p=0.25, seed=seed
        ),
    }


@functools.cache
def expected(name: str) -> Sequence[Tensor]:
    return launches()[name]()


def run(name: str, schedule: Schedule) -> Outcome:
    device = torch.device("cpu")
    standard = expected(name)
    workspace.forget(device)
    return outcome(schedule, launches()[name], standard, lambda: workspace._counters(device, 0))


@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", spread(["many", "backward, many", "backward, one", "one"], default=1))
def test_right_in_every_schedule(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    split = config.lora_linear
    polls = 0
    for schedule in schedules(count):
        stay = schedule.seed % 2  # persistent blocks, which draw tile after tile
        monkeypatch.setattr(config, "lora_linear", lambda *form, stay=stay: split(*form)._replace(per_processor=stay))
        tuned.derived.clear()
        done = run(name, schedule)
        assert (done.verdict, len(set(done.turns)) == 4) == ("right", stay == 1), schedule
        polls += done.polls
    assert polls, "no tile ever waited"


PUBLISH = 'tl.atomic_add(counters + READY + row_block, 1, sem="release")'
BARRIER = "    tl.debug_barrier()\n    "
LEFT = 'tl.atomic_add(counters + LEFT, 1, sem="acq_rel") == tl.num_programs(0) - 1:'
ARRIVED = 'tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == splits - 1'
DRAWN = "tile = draw_ticket(counters) if ONCE else tl.program_id(0)"

# name: (the verdict of some schedule, the module, changes of its source)
MUTANTS = {
    "block id for ticket": ("hang", lora_linear, (DRAWN, "tile = tl.program_id(0)")),
    "expand tiles first": (
        "hang",
        lora_linear,
        (DRAWN, "tile = shrink_tiles + expand_tiles - 1 - draw_ticket(counters)"),
    ),
    "z not released": ("wrong", tickets, (PUBLISH, PUBLISH.replace("release", "relaxed"))),
    "z not acquired": ("wrong", tickets, ('0, sem="acquire"', '0, sem="relaxed"')),
    "no barrier before the release of z": ("wrong", tickets, (BARRIER + PUBLISH, "    " + PUBLISH)),
    "every split publishes": ("wrong", lora_linear, ("                if complete:\n", "                if True:\n")),
    "published to another row block": ("hang", lora_linear, ("* SHRINK_M // BLOCK_M)", "* 0)")),
    "waits for nothing": ("wrong", expand, ("            if z_pages > 0:", "            if z_pages > 99:")),
    "waits for one tile less": ("wrong", tickets, ('sem="acquire") < tiles', 'sem="acquire") < tiles - 1')),
    "waits for one tile more": ("hang", tickets, ('sem="acquire") < tiles', 'sem="acquire") < tiles + 1')),
    "parts not released": ("wrong", tickets, (ARRIVED, ARRIVED.replace("acq_rel", "acquire"))),
    "parts not acquired": ("wrong", tickets, (ARRIVED, ARRIVED.replace("acq_rel", "release"))),
    "no barrier before the arrival": (
        "wrong",
        tickets,
        (BARRIER + "last = " + ARRIVED, "    last = " + ARRIVED),
    ),
    "the last but one sums": ("wrong", tickets, (ARRIVED, ARRIVED.replace("- 1", "- 2"))),
    "summed from the last to arrive on": (
        "wrong",
        tickets,
        ("        part = tl.load(parts + place)\n", ""),
        ("tl.load(parts + other *", "tl.load(parts + (split + other) % splits *"),
    ),
    "arrivals not reset": ("not reset", tickets, ("        tl.store(arrivals + tile, 0)\n", "")),
    "reset by the first to leave": ("wrong", tickets, (LEFT, LEFT.replace("tl.num_programs(0) - 1", "0"))),
    "reset by the last but one": ("hang", tickets, (LEFT, LEFT.replace("- 1", "- 2"))),
    "nobody resets": ("not reset", tickets, (LEFT, LEFT.replace("- 1", "+ 1"))),
    "left in no order": ("race", tickets, (LEFT, LEFT.replace("acq_rel", "relaxed"))),
}


@pytest.mark.parametrize("name", spread(MUTANTS, default=4))
def test_mutants_are_found(name: str) -> None:
    verdict, module, *changes = MUTANTS[name]
    expected("one")
    with mutant(module, *changes):
        # a value that is read too early may be right by chance; then the verdict is a race
        found = {verdict, "race"} if verdict == "wrong" else {verdict}
        assert any(run("one", schedule).verdict in found for schedule in MORE_SCHEDULES)


@pytest.fixture
def overlapped(monkeypatch: pytest.MonkeyPatch) -> None:
    split = config.lora_linear
    monkeypatch.setattr(config, "lora_linear", lambda *form: split(*form)._replace(once=False, overlap=True))
    tuned.derived.clear()


@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", spread(["one", "backward, one", "many", "backward, many"], default=1))
def test_launches_that_overlap_are_right_in_every_schedule(name: str, count: int, overlapped: None) -> None:
    done = [run(name, schedule) for schedule in schedules(count)]
    assert [each.verdict for each in done] == ["right"] * count
    assert sum(each.overlaps > 0 for each in done) >= count // 2
    assert sum(each.polls for each in done), "no tile ever waited"


WAIT = "        if OVERLAP:\n            wait_for_launch_before()\n"
LET = '    if OVERLAP and PART == "shrink":\n        let_next_launch_begin()\n'
ADDED = "        if OWN_SUMS:\n            kept ="

# name: (the verdict of some schedule, the module, changes of its source)
MUTANTS_OF_OVERLAP = {
    "no wait": ("wrong", expand, (WAIT, "")),
    "waits before it stores, and not before it reads z": ("wrong", expand, (WAIT, ""), (ADDED, WAIT + ADDED)),
    "only the first tile waits": ("wrong", expand, (WAIT, WAIT.replace("OVERLAP:", "OVERLAP and tile == 0:"))),
    "counters of both": (
        "wrong",
        lora_linear,
        ("expand_arrivals = shrink_arrivals + shrink_tiles", "expand_arrivals = shrink_arrivals"),
    ),
    "parts of both": (
        "race",
        lora_linear,
        (
            "expand_partials = partials[record.expand_partials :] if record.expand_partials else partials",
            "expand_partials = partials",
        ),
    ),
}


@pytest.mark.parametrize("name", spread(MUTANTS_OF_OVERLAP, default=1))
def test_mutants_of_launches_that_overlap_are_found(name: str, overlapped: None) -> None:
    verdict, module, *changes = MUTANTS_OF_OVERLAP[name]
    expected("one")
    with mutant(module, *changes):
        found = {verdict, "race"} if verdict == "wrong" else {verdict}
        assert any(run("one", schedule).verdict in found for schedule in MORE_SCHEDULES)


@pytest.mark.full
@pytest.mark.parametrize("change", [(LET, ""), ("launch_pdl", "launch_later")])
def test_what_lets_the_second_launch_begin(change: tuple[str, str], overlapped: None) -> None:
    """Without one of the two it begins when the first has ended, which is right too."""
    module = config if "launch_pdl" in change[0] else lora_linear
    with mutant(module, change):
        done = [run("one", schedule) for schedule in SCHEDULES[:3]]
    assert [(each.verdict, each.overlaps) for each in done] == [("right", 0)] * 3


def test_after_a_hang_the_next_call_is_right() -> None:
    """The launcher discards the counters of a launch that failed."""
    expected("one")
    workspace.forget(torch.device("cpu"))  # which a previous mutant may have left nonzero
    _, module, *changes = MUTANTS["waits for one tile more"]
    with mutant(module, *changes), interleaved(SCHEDULES[0]), pytest.raises(HangError):
        launches()["one"]()
    for actual, standard in zip(launches()["one"](), expected("one"), strict=True):
        assert torch.equal(actual, standard)
