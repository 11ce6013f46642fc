"""The checks of `peftk selftest --triage`, in the interpreter, with stand-ins for a GPU: what is wrong is found."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftk.adapters.bank import AdapterBank
from peftk.adapters.table import AdapterTable
from peftk.backends import triton
from peftk.launch import workspace
from peftk.nn import MultiLoRALinear
from peftk.reference import bounds
from peftk.tools.benchmark import common
from peftk.tools.benchmark.common import Side
from peftk.tools.selftest import target
from peftk.tools.selftest.behaviour import Results
from peftk.tools.selftest.check import Found, WrongError
from peftk.tools.selftest.work import Work, build_case
from peftk.tools.triage import correctness, timing
from peftk.tools.triage.timing import Series
from peftk.triton_kernels import lora_linear as kernels
from tests.support.stand_ins import rerun
from tests.support.tiers import FULL

HERE = target("interpreter")
OURS = ["base only", "1 launch", "2 launches", "overlapped", "field", "gemm", "shrink alone"]
SIDES = ["nn.Linear", "nn.Linear + two addmm", *OURS]
Run = Callable[[], Results]


def make_work(backend: str = "triton") -> Work:
    return Work(build_case((17, 40, 24), (16,), torch.float32, "cpu", many=False, biases=True), backend)


@pytest.mark.parametrize("backend", ["triton", "gemm"])
def test_repeats(backend: str) -> None:
    found = correctness.check_repeats(make_work(backend), 2)
    assert 0.0 < found.error <= 1.0


def test_one_run_of_many_with_other_bits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    work, runs = make_work(), 0
    results = work.run()

    def run() -> list[Tensor]:
        nonlocal runs
        runs += 1
        return [r * (1 + 1e-6) if runs == 7 and number == 2 else r.clone() for number, r in enumerate(results)]

    monkeypatch.setattr(work, "run", run)
    with pytest.raises(WrongError, match="dA of adapter 0: other bits than in the first run in 1 of 9 runs"):
        correctness.check_repeats(work, 10)


def test_a_counter_that_is_left_is_found() -> None:
    work = make_work()
    work.run()
    [counters] = workspace._of_stream.values()
    counters[-1] = 1
    with pytest.raises(WrongError, match="1 counters are not zero"):
        correctness.check_repeats(work, 2)
    counters[-1] = 0


def test_a_product_that_is_rounded_twice_has_its_bound() -> None:
    """The gemm backend's y and dX may differ by the rounding of the product, and no more."""
    work = make_work("gemm")
    results = work.run()
    assert work.error(results) <= 1.0
    for number, name in enumerate(["y", "dX"]):
        wrong = [r.clone() for r in results]
        wrong[number][0, 0] += 1e-4
        with pytest.raises(WrongError, match=f"^{name}: error"):
            work.error(wrong)


def test_a_replay_sees_adapters_that_were_loaded_since() -> None:
    correctness.check_replay_after_loading(HERE, "triton", capture=rerun)


def test_a_graph_that_keeps_its_table_is_found() -> None:
    """As one that has the addresses of a table that was replaced."""
    table, kept = AdapterBank.table, []

    def first_table(bank: AdapterBank) -> AdapterTable | None:
        kept.append(table(bank))
        return kept[0]

    def capture(run: Run) -> tuple[Results, Callable[[], object]]:
        def with_first() -> Results:
            with pytest.MonkeyPatch.context() as inside:
                inside.setattr(AdapterBank, "table", first_table)
                return run()

        return rerun(with_first)

    with pytest.raises(WrongError, match="replay after an adapter replaced in its slot: bits differ"):
        correctness.check_replay_after_loading(HERE, "triton", capture=capture)


def test_a_graph_that_keeps_its_ids_is_found() -> None:
    with pytest.raises(WrongError, match="replay after ids changed in place: bits differ"):
        correctness.check_replay_after_loading(HERE, "triton", capture=lambda run: (run(), lambda: None))


def test_refusing_more_ranks_than_at_the_capture_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    add = MultiLoRALinear.add_adapter

    def refuse(layer: MultiLoRALinear, name: str, A: Tensor, B: Tensor, **options: Any) -> int:
        if A.shape[0] == refused:
            raise ValueError("lora_A: more ranks than declared")
        return add(layer, name, A, B, **options)

    monkeypatch.setattr(MultiLoRALinear, "add_adapter", refuse)
    refused = 80
    correctness.check_replay_after_loading(HERE, "triton", capture=rerun)
    refused = 20
    with pytest.raises(ValueError, match="more ranks than declared"):
        correctness.check_replay_after_loading(HERE, "triton", capture=rerun)


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=FULL)])
def test_compiled_layers(many: bool) -> None:
    correctness.check_reduce_overhead(HERE, many, options={"backend": "aot_eager"})


def test_a_compiled_layer_that_keeps_its_result_is_found() -> None:
    """As a graph whose input was copied once."""
    kept: dict[bool, Any] = {}

    def compiler(module: Callable[..., Any], _: object) -> Callable[..., Any]:
        return lambda *args: kept.setdefault(torch.is_grad_enabled(), module(*args))

    with pytest.raises(WrongError, match="result 0 of infer 2, compiled and eager: bits differ"):
        correctness.check_reduce_overhead(HERE, False, options={"backend": compiler})


def one_row() -> Found:
    [check] = timing.gpu_time(HERE, Series(N=4096, rank=16))
    found = check.run()
    assert isinstance(found, Found)
    return found


def test_every_side_is_timed() -> None:
    found = one_row()
    assert found.problem is None
    assert found.figures is not None
    assert list(found.figures["us"]) == SIDES
    assert all(times["median"] > 0 for times in found.figures["us"].values())
    assert list(found.figures["not_run"]) == ["cuda"]


def test_a_side_that_is_wrong_or_raises_is_named_and_the_others_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    lora_linear = triton.lora_linear

    def broken(*args: Any, base: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
        if base is not None and base.shape[1] == 0:
            raise RuntimeError("no image for this GPU")
        y, z = lora_linear(*args, base=base, **options)
        return (y if base is None else y * 1.01), z

    monkeypatch.setattr(triton, "lora_linear", broken)
    found = one_row()
    assert found.problem is not None
    assert re.search(r"gemm: error .* the bound", found.problem)
    assert "shrink alone: RuntimeError: no image for this GPU" in found.problem
    assert found.figures is not None
    timed = {side for side, times in found.figures["us"].items() if times["median"] is not None}
    assert timed == set(SIDES) - {"gemm", "shrink alone"}


def sides_of(layer: timing._Layer, M: int) -> dict[str, Side]:
    x = torch.randn(M, layer.A.shape[1], generator=torch.Generator().manual_seed(1)).to(layer.linear.weight.dtype)
    base = bounds.linear(x, layer.linear.weight, layer.linear.bias)
    expected = bounds.with_adapter(x, *base, layer.A, layer.B, timing.SCALING)
    return {side.name: side for side in timing._sides(layer, x, expected, base)}


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
def test_the_field_s_precision_has_its_bound(factors: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bound is needed, and no wider than it must be."""
    A, B = (t.to(factors) for t in common.factors(48, 40, 2, torch.float32, "cpu"))
    layer = timing._Layer(common.plain_linear(48, 40, torch.bfloat16, "cpu"), A, 30 * B)
    assert 0.2 < sides_of(layer, 33)["field"].error() <= 1.0
    monkeypatch.setattr(bounds, "of_field", lambda *_: 0.0)
    assert sides_of(layer, 33)["field"].error() > 1.0
    assert sides_of(layer, 33)["1 launch"].error() <= 1.0


def test_each_way_to_launch_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, bool]] = []
    run = kernels.Launch.run

    def seen(launch: kernels.Launch, *arguments: Any) -> None:
        made.append((launch._constants["PART"], launch._constants["OVERLAP"]))
        run(launch, *arguments)

    monkeypatch.setattr(kernels.Launch, "run", seen)
    layer = timing._Layer(
        common.plain_linear(48, 40, torch.float32, "cpu"), *common.factors(48, 40, 2, torch.float32, "cpu")
    )
    sides = sides_of(layer, 3)
    for name, expected in {
        "1 launch": [("both", False)],
        "2 launches": [("shrink", False), ("expand", False)],
        "overlapped": [("shrink", True), ("expand", True)],
    }.items():
        made.clear()
        assert sides[name].error() <= 1.0
        assert made == expected, name


def test_host_time() -> None:
    [check] = timing.host_time(HERE)
    found = check.run()
    assert isinstance(found, Found)
    assert found.figures is not None
    assert {"nn.Linear", "LoRALinear", "MultiLoRALinear", "triton", "gemm"} <= set(found.figures["us"])
