"""The triage's checks of the CUDA C++ kernels, on the host, with stand-ins for a GPU."""

from __future__ import annotations

import contextlib

import pytest
from torch import Tensor

from peftk.backends import cuda
from peftk.tools.selftest import behaviour
from peftk.tools.selftest.check import Check, Found, NotRunError, Target, WrongError
from peftk.tools.triage import correctness, timing
from peftk.tools.triage.timing import Series
from tests.support.stand_ins import rerun
from tests.support.tiers import spread

HERE = Target("cpu", "cpu", ("cuda",))
RUNS = 3  # of 200
DECODE = list(correctness.decode(HERE))
MERGE = list(correctness.merge(HERE))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "RUNS", RUNS)


def passes(check: Check) -> bool:
    found = check.run()
    return (found.error if isinstance(found, Found) else found) <= 1.0


def test_decode_has_random_steps_and_calls_that_are_repeated() -> None:
    assert [check.op for check in DECODE] == ["random decode steps"] * 100 + ["repeated"] * 8


@pytest.mark.parametrize("check", spread(DECODE, default=8, full=50), ids=str)
def test_decode(check: Check) -> None:
    assert passes(check)


@pytest.mark.parametrize("check", spread([c for c in MERGE if c.backend == "cuda"], default=4, full=8), ids=str)
def test_merge(check: Check) -> None:
    assert passes(check)


def test_a_backend_that_is_not_here_says_so() -> None:
    [absent] = [check for check in MERGE if check.backend == "triton"]
    with pytest.raises(NotRunError, match="runs on cuda tensors"):
        absent.run()


def test_one_run_of_many_with_other_bits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lora_linear, calls = cuda.lora_linear, 0

    def sometimes_wrong(*args: object, **options: object) -> tuple[Tensor, Tensor | None]:
        nonlocal calls
        calls += 1
        y, z = lora_linear(*args, **options)  # type: ignore[arg-type]
        return (y * 1.01 if calls == RUNS else y), z

    monkeypatch.setattr(cuda, "lora_linear", sometimes_wrong)
    check = next(check for check in DECODE if check.case.startswith("one adapter"))
    with pytest.raises(WrongError, match="y: other bits than in the first run in 1 of 2 runs"):
        check.run()


def test_graphs_see_other_inputs_and_adapters() -> None:
    """Replays as of a captured graph, by calling again into the same tensors."""
    works = [make for backend, _, make in correctness._works(HERE) if backend == "cuda"]
    assert len(works) == 8
    for make in works[1:4]:
        behaviour.check_replay(make(), capture=rerun)
    correctness.check_replay_after_loading(HERE, "cuda", capture=rerun)


def test_a_graph_that_keeps_its_ids_is_found() -> None:
    with pytest.raises(WrongError, match="replay after ids changed in place: bits differ"):
        correctness.check_replay_after_loading(HERE, "cuda", capture=lambda run: (run(), lambda: None))


def test_streams() -> None:
    makers = [make for _, make in behaviour.decode_works(HERE)]
    behaviour.check_streams(makers, lambda count: [contextlib.nullcontext] * count, 2)


def test_its_side_is_timed() -> None:
    [check] = timing.gpu_time(HERE, Series(N=40, rank=2, K=48, tokens=(3,), seconds=0.01, repeats=1))
    found = check.run()
    assert isinstance(found, Found)
    assert found.figures is not None
    assert found.figures["us"]["cuda"]["median"] > 0
    assert found.figures["us"]["cuda"]["error"] <= 1.0
    assert "cuda" not in found.figures["problems"]
