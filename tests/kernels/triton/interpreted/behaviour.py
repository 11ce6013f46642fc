"""The checks of `peftk selftest --device cuda` other than results, in the interpreter, with stand-ins for a GPU."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

import peftk
from peftk import functional
from peftk.adapters.adapter import Adapter
from peftk.backends import triton
from peftk.cli import main
from peftk.launch import workspace
from peftk.system import streams
from peftk.tools import selftest
from peftk.tools.selftest import behaviour, parity, target
from peftk.tools.selftest.check import Check, WrongError
from peftk.tools.selftest.plans import override_plan
from peftk.tools.selftest.work import Form, Work, build_case
from peftk.triton_kernels import segments as kernels
from tests.support.cases import normal
from tests.support.fake_streams import Device
from tests.support.segment_cases import random_ids
from tests.support.stand_ins import rerun
from tests.support.tiers import FULL, spread

HERE = target("interpreter")
WORKS = dict(behaviour.works(HERE))


def stale_capture(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], object]]:
    """A graph that does not follow its inputs."""
    return run(), lambda: None


STAND_INS = behaviour.tools(HERE)._replace(
    capture=rerun, streams=lambda count: [contextlib.nullcontext] * count, forbid_sync=contextlib.nullcontext
)


def merge_and_unmerge() -> Callable[[], list[Tensor]]:
    original = [normal(9, K, dtype=torch.bfloat16, seed=K) for K in (33, 64)]
    A, B = (
        [normal(3, K, dtype=torch.float32, seed=1) for K in (33, 64)],
        [normal(9, 3, dtype=torch.float32, seed=2)] * 2,
    )

    def run() -> list[Tensor]:
        weights = [weight.clone() for weight in original]
        receipts = functional.merge_layers_(weights, A, B, backend="triton")
        merged = [weight.clone() for weight in weights]
        receipts = functional.remerge_layers_(weights, receipts, A, B, 0.5, backend="triton")
        functional.unmerge_layers_(weights, receipts, backend="triton")
        return [*merged, *weights]

    return run


def sort_rows() -> Callable[[], list[Tensor]]:
    """Rows sorted by one launch, and by three."""
    ids = [random_ids(M, 9) for M in (17, kernels.TILE + 1)]
    return lambda: [tensor for each in ids for tensor in kernels.segments(each, 9)]


def split_sums() -> Callable[[], list[Tensor]]:
    """A call whose partial sums have memory of their own."""
    x, weight = normal(5, 300, dtype=torch.float32, seed=1), normal(40, 300, dtype=torch.float32, seed=2)
    A, B = normal(4, 300, dtype=torch.float32, seed=3), normal(40, 4, dtype=torch.float32, seed=4)
    return lambda: [functional.lora_linear(x, weight, None, A, B, 0.5, backend="triton")]


# the last four run always, the others in the full tier
CALLS = {name: lambda make=make: make().run for name, make in behaviour.works(HERE)}
CALLS |= {"a linear": CALLS["one adapter, dropout, M=17 K=40 N=24"], "merge": merge_and_unmerge, "segments": sort_rows}
CALLS |= {"split sums": split_sums}


@pytest.mark.parametrize("name", [pytest.param(name, marks=(FULL,) * ("," in name)) for name in CALLS])
def test_allocations_and_launches_are_on_the_tensors_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any default device of torch. Triton launches on the current device, which `streams.on` sets."""
    chosen: list[torch.device] = []
    launches: list[list[torch.device]] = []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        chosen.append(device)
        yield
        chosen.pop()

    launch = GridExecutor.__call__

    def launched(*args: Any, **kwargs: Any) -> Any:
        launches.append(list(chosen))
        return launch(*args, **kwargs)

    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(streams, "on", on)
    monkeypatch.setattr(GridExecutor, "__call__", launched)
    run = CALLS[name]()
    expected = run()
    with torch.device("meta"):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert launches
    assert all(devices == [torch.device("cpu")] for devices in launches)


NEED_A_GPU = ("CUDA graph", "no waiting", "streams")


WITH_STAND_INS = [check for check in behaviour.checks(HERE, STAND_INS) if check.op in NEED_A_GPU]


@pytest.mark.parametrize("check", spread(WITH_STAND_INS, default=1), ids=str)
def test_what_needs_a_gpu_with_stand_ins(check: Check) -> None:
    check.run()


@pytest.mark.full
def test_the_whole_command(tmp_path: pathlib.Path) -> None:
    """In a rehearsal, every section runs or says why not."""
    result = CliRunner().invoke(main, ["selftest", "--device", "interpreter", "--out", str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    assert "All passed" in result.output
    written = json.loads((tmp_path / "made" / "report.json").read_text())
    assert written["passed"]
    assert (tmp_path / "made" / "report.txt").read_text() in result.output
    left_out = {o["op"]: o["not_run"] for o in written["outcomes"] if o["not_run"] is not None}
    assert all(left_out[op] == "needs a GPU" for op in NEED_A_GPU)
    assert "not run: triton no waiting, triton CUDA graph, triton streams" in result.output
    assert {o["section"] for o in written["outcomes"]} == {"parity", "behaviour", "speed"}
    ran = {o["op"] for o in written["outcomes"] if o["not_run"] is None}
    assert {
        "lora_linear",
        "backward",
        "multi_lora_linear",
        "random cases",
        "adapter_block",
        "multi_adapter_block",
        "packed outputs",
        "every tile",
        "every way to launch",
        "segments",
    } <= ran
    assert {"same bits twice", "counters at zero", "launches", "torch.compile", "opcheck"} <= ran
    assert {"forward", "forward and backward", "one launch or two"} <= ran
    assert {r["side"] for r in written["speed"]} >= {"nn.Linear", "HF PEFT", "peftk triton", "peftk 2 launches"}


def test_the_command_names_a_wrong_case(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    wgrad = triton.gradients.wgrad

    def slightly_wrong(*args: object, **kwargs: object) -> object:
        return [
            None if g is None else g._replace(lora_B=None if g.lora_B is None else g.lora_B * 1.01)
            for g in wgrad(*args, **kwargs)
        ]

    monkeypatch.setattr(triton.gradients, "wgrad", slightly_wrong)
    monkeypatch.setattr(parity, "DTYPES", (torch.float32,))
    for sweep in ("_random", "_forms", "_launches", "_segments"):
        monkeypatch.setattr(parity, sweep, lambda *_: ())
    result = CliRunner().invoke(
        main, ["selftest", "--device", "interpreter", "--section", "parity", "--out", str(tmp_path)]
    )
    assert result.exit_code == 1
    assert re.search(r"triton every tile, float32 M=17 .*: dB of adapter 0: error .* the bound", result.output)
    assert not json.loads((tmp_path / "report.json").read_text())["passed"]


def test_after_losing_the_gpu_only_runnable_checks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access\nand more")

    def fails() -> float:
        raise RuntimeError("an illegal memory access")

    checks = [Check("parity", "triton", "op", f"case {n}", fails if n == 1 else lambda: 0.5) for n in range(4)]
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(selftest, "_checks", lambda *_: iter(checks))
    monkeypatch.setattr(selftest.report, "describe", lambda where: {"target": "cuda", "gpu": "one", "cpu": ""})
    console = Console(record=True, width=200)
    assert not selftest.run(target("cpu")._replace(name="cuda", device="cuda"), console, sections=("parity",))
    shown = console.export_text()
    assert "this process cannot use the GPU since triton op, case 1: an illegal memory access" in shown
    assert "(2 cases)" in shown
    assert "1 cases failed" in shown


def make_work() -> Work:
    return WORKS["many adapters, dropout, M=17 K=40 N=24"]()


def test_a_graph_that_keeps_its_inputs_is_found() -> None:
    with pytest.raises(WrongError, match="replay 1: bits differ"):
        behaviour.check_replay(make_work(), capture=stale_capture)


@pytest.mark.parametrize("kept", spread(["ids", "seed"], default=0))
def test_a_graph_that_keeps_ids_or_seed_is_found(kept: str) -> None:
    """Such as a graph that sorts before the capture."""
    work = make_work()

    def capture(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], object]]:
        tensor = work.case.ids if kept == "ids" else work.seed
        assert tensor is not None
        old = tensor.clone()

        def with_old() -> list[Tensor]:
            new = tensor.clone()
            tensor.copy_(old)
            results = run()
            tensor.copy_(new)
            return results

        return rerun(with_old)

    with pytest.raises(WrongError, match="bits differ"):
        behaviour.check_replay(work, capture=capture)


def test_results_that_change_from_run_to_run_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lora_linear = functional.lora_linear
    monkeypatch.setattr(functional, "lora_linear", lambda *a, **k: lora_linear(*a, **k) * (1 + torch.rand(1)))
    with pytest.raises(WrongError, match="a second run: bits differ"):
        behaviour.check_repeatable(WORKS["one adapter, dropout, M=17 K=40 N=24"]())


def test_a_table_that_is_written_in_place_gives_the_bits_of_one_that_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        bank = peftk.AdapterBank(24, 16, 3, torch.float32, "cpu", max_rank=32)
        for number, rank in enumerate((1, 17)):
            A, B, a, beta = (torch.randn(*shape) for shape in ((rank, 24), (16, rank), (rank,), (16,)))
            bank.add(f"{number}", A, B, 0.5, activation="gelu", bias_A=a, bias_B=beta, slot=2 - number)
        x, ids = torch.randn(5, 24, requires_grad=True), torch.tensor([2, 1, -1, 1, 2])
        y = functional.multi_lora_linear(x, torch.randn(16, 24), None, bank, ids, backend="triton")
        y.sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad]

    built = results()
    Device(monkeypatch)
    for one, other in zip(built, results(), strict=True):
        assert torch.equal(one, other)


def test_the_layout_of_a_live_table_holds_for_adapters_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has it as a constant. Trainable factors lie differently from the pages of a pool."""
    Device(monkeypatch)
    A, B = torch.nn.Parameter(torch.randn(16, 32)), torch.nn.Parameter(torch.randn(32, 16))
    bank = peftk.AdapterBank(32, 32, 3, torch.float32, "cpu", max_rank=16)
    assert triton._table_adapters(bank.table())[3:] == ("k16", "k16")
    bank.lend("trained", lambda: Adapter((A,), (B,), 1.0))
    with_trained = triton._table_adapters(bank.table())
    bank.add("served", torch.randn(16, 32), torch.randn(32, 16), 1.0)
    assert triton._table_adapters(bank.table())[3:] == with_trained[3:] == ("k16", "any")


def test_a_counter_that_is_left_is_found() -> None:
    work = WORKS["one adapter, dropout, M=17 K=40 N=24"]()
    work.run()
    [counters] = workspace._of_stream.values()
    counters[-1] = 1
    with pytest.raises(WrongError, match="1 counters are not zero"):
        behaviour.check_counters(work)
    counters[-1] = 0


def test_a_launch_too_many_is_found() -> None:
    work = WORKS["one adapter, dropout, M=17 K=40 N=24"]()
    with override_plan(once=False), pytest.raises(WrongError, match="forward: expected the launches"):
        behaviour.check_launches(work, count=STAND_INS.kernels)


@pytest.mark.full
def test_compiled_layers_run_our_kernels() -> None:
    launches = STAND_INS.kernels(lambda: behaviour.check_compile(HERE, 17, True, compiler="aot_eager"))
    assert launches.count("wgrad_kernel") == 2  # eager, compiled


@pytest.mark.parametrize("form", ["linear", "series", "packed"])
def test_wrong_gradients_are_found(form: Form) -> None:
    work = Work(build_case((5, 33, 17), (3,), torch.float32, "cpu", many=form == "packed", form=form), "triton")
    results = work.run()
    assert work.error(results) <= 1.0
    for number, name in enumerate(["y", "dX", "dA of adapter 0", "dB of adapter 0"]):
        wrong = [r.clone() for r in results]
        wrong[number][0, 0] *= 1.001
        with pytest.raises(WrongError, match=f"^{name}: error"):
            work.error(wrong)
