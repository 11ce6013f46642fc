"""`peftk bench --suite cpu`: the targets, their marks, and tiny runs of every kind of row."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import time

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from peftk import _cpu, cli
from peftk.backends import choice, first_use
from peftk.backends.made_on import Verdict
from peftk.system import extras
from peftk.system.timing import summary
from peftk.tools.benchmark import common, contended, lora_linear, suite, suite_cases
from peftk.tools.benchmark.common import COPY, LINEAR, PEFT, Shape
from peftk.tools.benchmark.engines import ONNX_RUNTIME, OPENVINO
from peftk.tools.benchmark.roofline import Bound, Row, Work
from peftk.tools.benchmark.suite import NOT_MEASURED, NOT_QUIET, PASS, SHORT, WRONG
from peftk.tools.benchmark.targets import (
    BASE,
    COMPILE,
    CONTENDED,
    FMA_PEAK,
    ONE_ADAPTER,
    ONE_BY_ONE,
    PEFTK,
    PLAIN_MODEL,
    READ,
    TARGETS,
    Target,
    beside,
)

WHERE = {"peftk": "0", "cpu": "some", "torch": "0", "load": None, "cores": 2}


@pytest.fixture(autouse=True)
def not_run(monkeypatch):
    """The machine is as quiet as the list says, whatever runs beside the tests."""
    share = [0.0]

    class Watch:
        def not_run(self):
            return share[0]

    monkeypatch.setattr(suite, "Watch", Watch)
    monkeypatch.setattr(contended, "Watch", Watch)
    return share


def invoke(*arguments: str):
    return CliRunner().invoke(cli.main, ["bench", *arguments])


def run(*targets: Target, **options):
    console = Console(width=110, record=True, quiet=True)
    return suite.run(console, suite.Options(seconds=0.001, repeats=1, **options), WHERE, targets)


def small(op: str, M: int = 8, K: int = 288, N: int = 272, rank: int = 16, adapters: int = 1, dtype: str = "bf16"):
    return Shape(op, dtype, M, K, N, rank, adapters)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_targets_of_the_forward():
    targets = {(t.shape, t.peer): t for t in TARGETS}
    shares = {16: 0.65, 64: 0.8, 256: 0.85, 512: 0.85}
    for dtype in ("bf16", "fp32"):
        for M in (1, 4, 16, 64, 256, 512):
            shape = Shape("lora_linear", dtype, M, 4096, 4096, 16, 1)
            assert targets[shape, LINEAR][3:] == (1.0, False, 0.03, True)
            assert targets[shape._replace(op="compile"), COMPILE][3:] == (1.0, False, 0.0, False)
            if M in shares:
                assert targets[shape, FMA_PEAK][3:] == (shares[M], False, 0.0, False)
        assert targets[Shape("lora_linear", dtype, 1, 4096, 4096, 16, 1), READ][3:] == (0.85, False, 0.0, False)


def test_targets_of_the_rest():
    targets = {(t.shape, t.peer): (t.value, t.at_most) for t in TARGETS}
    assert len(targets) == len(TARGETS)
    for dtype in ("bf16", "fp32"):
        for K, N in ((384, 384), (768, 768), (1024, 1024), (4096, 11008)):
            for M in (1, 16, 256):
                assert targets[Shape("lora_linear", dtype, M, K, N, 16, 1), LINEAR] == (1.0, False)
        for M in (16, 64, 256):
            assert targets[Shape("adapter_cost", dtype, M, 4096, 4096, 16, 1), BASE] == (1.03, True)
            assert targets[Shape("adapter_cost", dtype, M, 4096, 4096, 64, 1), BASE] == (1.08, True)
        assert targets[Shape("adapter_cost", dtype, 64, 4096, 4096, 16, 64), ONE_ADAPTER] == (1.10, True)
        assert targets[Shape("lora_linear", dtype, 1, 64, 64, 16, 1), LINEAR] == (1.5, True)
        assert targets[Shape("multi_lora_linear", dtype, 8, 64, 64, 16, 8), LINEAR] == (2.0, True)
        assert targets[Shape("train", dtype, 256, 4096, 4096, 16, 1), PEFT] == (1.0, False)
    for dtype, copies in (("fp32", 2), ("bf16", 4), ("fp16", 4)):
        merge = Shape("merge", dtype, 0, 4096, 4096, 16, 1)
        assert targets[merge, COPY] == targets[merge._replace(op="unmerge"), COPY] == (copies, True)
    for dtype, copies in (("fp32", 2), ("bf16", 4)):
        whole = Shape("merge_model", dtype, 0, 384, 384, 16, 1)
        assert targets[whole, COPY] == (copies, True)
        assert targets[whole._replace(op="merged_context"), COPY] == (2 * copies, True)
    for M in (1, 16):
        for processes in (1, 2):
            shape = Shape("contended", "fp32", M, 1024, 1024, 16, 1)
            assert targets[shape, f"nn.Linear beside {processes}"] == (1.3, True)
    assert {t.shape.op for t in TARGETS} == set(suite_cases.OPS) == set(cli.SUITE_OPS)


def test_targets_of_whole_models():
    targets = {(t.shape, t.peer): (t.value, t.at_most) for t in TARGETS}
    for dtype in ("bf16", "fp32"):
        for sentences in (1, 16, 64):
            shape = Shape("model", dtype, 21 * sentences, 384, 384, 16, 1)
            assert targets[shape, PLAIN_MODEL] == targets[shape, PEFT] == (1.0, False)
            compiled = shape._replace(op="model_compiled")
            assert targets[compiled, PEFTK] == targets[compiled, COMPILE] == (1.0, False)
            assert (compiled, ONNX_RUNTIME) in targets or dtype == "bf16"
        one = Shape("model_train", dtype, 336, 384, 384, 16, 1)
        assert targets[one, PEFT] == (1.0, False)
        memory = one._replace(op="model_memory", M=336 if dtype == "fp32" else 84)
        assert targets[memory, PEFT] == (1.0 if dtype == "fp32" else 0.8, True)
        assert targets[memory, f"{PEFT}, dropout 0.05"] == (0.8, True)
        for sequences in (1, 8, 64):
            decode = Shape("decode", dtype, sequences, 512, 512, 8, sequences)
            assert targets[decode, PLAIN_MODEL] == (0.95, False)
            assert ((decode, PEFT) in targets) == (sequences == 8)
    for sentences, value in ((1, 0.8), (16, 1.0), (64, 1.0)):
        compiled = Shape("model_compiled", "fp32", 21 * sentences, 384, 384, 16, 1)
        assert targets[compiled, ONNX_RUNTIME] == targets[compiled, OPENVINO] == (value, False)
    assert targets[Shape("model_train", "fp32", 336, 384, 384, 16, 8), ONE_BY_ONE] == (2.5, False)


def test_only_never_slower_targets_have_noise():
    assert {t.value for t in TARGETS if t.noise} == {1.0}
    assert {t.peer for t in TARGETS if t.net} == {LINEAR, PLAIN_MODEL, COMPILE}  # those without an adapter
    target = next(t for t in TARGETS if t.noise)
    assert str(target) == "≥ 1 (−3%) net"
    assert target.met(0.971)
    assert not target.met(0.969)


def test_options_choose_among_the_targets():
    def chosen(**options):
        return [target for target in TARGETS if suite.Options(**options).selects(target)]

    assert chosen() == list(TARGETS)
    assert {t.shape.dtype for t in chosen(dtypes=("bf16",))} == {"bf16"}
    assert {t.shape.op for t in chosen(ops=("train", "merge"))} == {"train", "merge"}
    assert {(t.shape.K, t.shape.N) for t in chosen(dims=((4096, 11008),))} == {(4096, 11008)}
    assert len(chosen(ops=("adapter_cost",), tokens=(64,), ranks=(16,), adapters=(64,))) == 2


# ---- from figures to marks ------------------------------------------------------------------------------------------


def test_limit():
    target = Target("", small("lora_linear"), LINEAR, 2.0)
    bound = Bound(work=Work(1000, 400), probed=Work(1000, 200))
    row = Row(None, bound)  # type: ignore[arg-type]
    times = {LINEAR: 30.0, FMA_PEAK: 5.0, READ: 5.0}
    assert suite._limit(target, row, times) == pytest.approx(30 / 10)  # twice the bytes of the probe
    assert suite._limit(target._replace(at_most=True), row, times) == pytest.approx(10 / 30)
    assert suite._limit(target._replace(peer=FMA_PEAK), row, times) == pytest.approx(1)
    assert suite._limit(target._replace(peer=READ), row, times) == pytest.approx(1 / 2)
    net = dataclasses.replace(row, adapter=Work(100, 0))
    assert suite._limit(target._replace(net=True), net, times) == pytest.approx(30 / (10 - 0.5))
    assert suite._limit(target, net, times) == pytest.approx(30 / 10)
    rest = dataclasses.replace(row, rest="rest")
    assert suite._limit(target, rest, {**times, "rest": 5.0}) == pytest.approx(30 / 15)
    extra = dataclasses.replace(row, extra=Work(600, 40))
    assert suite._limit(target, extra, times) == pytest.approx(1 + 3 / 30)
    assert suite._limit(target, dataclasses.replace(row, bound=None), times) is None


def test_every_kind_of_row_runs_and_is_right():
    targets = [
        Target("a", small("lora_linear"), LINEAR, 1e-6),
        Target("a", small("lora_linear"), FMA_PEAK, 1e6),
        Target("a", small("lora_linear"), READ, 1e-6),
        Target("b", small("train"), PEFT, 1e-6),
        Target("c", small("adapter_cost"), BASE, 1e6, at_most=True),
        Target("c", small("adapter_cost", adapters=4), ONE_ADAPTER, 1e6, at_most=True),
        Target("d", small("merge", M=0), COPY, 1e6, at_most=True),
        Target("d", small("merge", M=0), PEFT, 1e-6),
        Target("d", small("unmerge", M=0), COPY, 1e6, at_most=True),
        Target("e", small("multi_lora_linear", adapters=3), LINEAR, 1e6, at_most=True),
    ]
    outcome = run(*targets)
    assert outcome.all_correct
    assert [(r.section, r.peer, r.mark) for r in outcome.results] == [
        (t.section, t.peer, SHORT if t.peer == FMA_PEAK else PASS) for t in targets
    ]
    for result in outcome.results:
        assert result.ratio > 0
        assert result.limit is None or result.limit > 0
        assert (result.limit is None) == (result.op == "multi_lora_linear")
    assert outcome.results[1].beyond_limit
    assert "9 of 10 targets met; 1 short, 1 of them beyond this machine's limit" in suite.summary(outcome.results)
    assert outcome.roofline.fp32_gflops > 0


def test_no_verdict_on_a_machine_that_is_not_quiet(not_run):
    not_run[0] = 0.23
    shape = small("lora_linear")
    outcome = run(Target("a", shape, LINEAR, 1e-6), Target("a", shape, FMA_PEAK, 1e6))
    assert {(r.mark, r.not_run) for r in outcome.results} == {(NOT_QUIET, 0.23)}
    assert outcome.all_correct
    summary = suite.summary(outcome.results)
    assert "0 of 2 targets met; 2 not quiet" in summary
    assert "23.0% in the worst" in summary
    assert suite.markdown(outcome, WHERE).count("not quiet 23%") == 2


def test_how_quiet_it_was_may_be_unknown(not_run):
    not_run[0] = None
    outcome = run(Target("a", small("lora_linear"), LINEAR, 1e-6))
    assert outcome.results[0].mark == PASS
    assert "not known" in suite.summary(outcome.results)


def test_contended_rows(monkeypatch):
    """The ratio of two slowdowns, from means. Busy processes beside it slow down a side that waits for a core."""
    shape = small("contended", dtype="fp32")
    targets = [Target(CONTENDED, shape, beside(n), 1e6, at_most=True) for n in (1, 2)]
    outcome = run(*targets)
    assert outcome.all_correct
    assert [(r.peer, r.mark) for r in outcome.results] == [(beside(1), PASS), (beside(2), PASS)]
    assert [r.side for r in outcome.records] == [
        LINEAR, "peftk cpu", *(f"{side} beside {n}" for n in (1, 2) for side in (LINEAR, "peftk cpu"))
    ]  # fmt: skip

    samples = [{LINEAR: [1.0, 3.0], "peftk cpu": [1.0]}, {LINEAR: [1.0, 7.0], "peftk cpu": [3.0, 5.0]}]
    times = iter([{side: summary(its) for side, its in sides.items()} for sides in samples] * 2)
    monkeypatch.setattr(contended, "BUSY", (2,))
    monkeypatch.setattr(contended, "_times", lambda case, seconds: next(times))
    slowdowns = contended.measure(suite_cases.build(shape).case, 0.0).slowdowns
    assert slowdowns == {beside(2): (4.0, 4.0, pytest.approx((4 / 1) / (4 / 2)))}
    (result,) = run(targets[1]._replace(value=1.9)).results
    assert (result.mark, result.median_us, result.peer_us) == (SHORT, 4.0, 4.0)


def test_a_wrong_contended_side(monkeypatch):
    peftk_layer = lora_linear.peftk_layer
    monkeypatch.setattr(lora_linear, "peftk_layer", lambda linear, A, B, *rest: peftk_layer(linear, A, 1.05 * B, *rest))
    outcome = run(Target(CONTENDED, small("contended", dtype="fp32"), beside(1), 1.3, at_most=True))
    assert not outcome.all_correct
    assert outcome.results[0].mark == WRONG
    assert "peftk cpu is wrong by" in outcome.results[0].note


def test_what_first_use_measures_is_known_before_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTK_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PEFTK_FIRST_USE", "1")
    monkeypatch.setattr(first_use, "_gain", lambda call: 9.0)
    choice.forget()
    try:
        shape = small("lora_linear", dtype="fp32", M=64)
        assert common.backends_to_time(shape, "cpu", ()) == ["gemm"]
        assert not common.rounds_once(shape, "cpu", "gemm")
    finally:
        monkeypatch.undo()
        choice.forget()


def test_the_choice_is_what_is_measured(monkeypatch):
    """After `peftk tune`, torch's product may be chosen. Its 16-bit results round twice, and get the bound for that."""
    monkeypatch.setattr(choice.measured, "verdict", lambda call: Verdict(True, "as if measured"))
    choice.forget()
    try:
        shape = small("lora_linear", M=64)
        outcome = run(
            Target("", shape, LINEAR, 1e-6),
            Target("", shape._replace(op="train"), PEFT, 1e-6),
            Target("", shape._replace(op="adapter_cost"), BASE, 1e6, at_most=True),
            Target("", shape._replace(op="adapter_cost", adapters=4), ONE_ADAPTER, 1e6, at_most=True),
        )
    finally:
        monkeypatch.undo()
        choice.forget()
    assert outcome.all_correct
    assert [(r.side, r.mark) for r in outcome.results] == [("peftk gemm", PASS)] * 4


def test_bench_times_gemm_if_requested():
    result = invoke("--op", "lora_linear,multi_lora_linear,train", "--dims", "288", "--tokens", "64", "--ranks", "16",
                    "--backend", "gemm", "--repeats", "1")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "peftk gemm" in result.output


def test_net_of_the_adapters_own_work():
    """Of peftk's time, what its adapter's multiply-adds take at the measured speed is taken off."""
    shape = small("lora_linear", M=64)
    outcome = run(Target("a", shape, LINEAR, 1e-6), Target("a", shape, LINEAR, 1e-6, net=True))
    plain, net = outcome.results
    peak = next(record.median_us for record in outcome.records if record.side == FMA_PEAK)
    adapter = 64 * 16 * (288 + 272)
    own = plain.median_us - peak * adapter / (64 * 288 * 272 + adapter)
    assert plain.ratio == pytest.approx(plain.peer_us / plain.median_us)
    assert net.ratio == pytest.approx(plain.peer_us / own)
    assert "net" in suite.markdown(outcome, WHERE)


def test_rows_of_the_merged_model():
    outcome = run(*(t for t in TARGETS if t.shape.op in ("merge_model", "merged_context") and t.shape.dtype == "bf16"))
    assert outcome.all_correct
    assert [(r.op, r.peer) for r in outcome.results] == [("merge_model", COPY), ("merged_context", COPY)]
    assert all(r.limit > 0 for r in outcome.results)


@pytest.mark.full
def test_compile_row():
    """More shapes than Dynamo compiles of one function by default: each must still be compiled."""
    outcome = run(*(Target("", small("compile", M=M, dtype="fp32"), COMPILE, 1e-6) for M in range(1, 10)))
    assert outcome.all_correct
    assert {r.mark for r in outcome.results} == {PASS}


def test_missing_packages_are_reported(monkeypatch):
    installed = extras.is_installed
    monkeypatch.setattr(extras, "is_installed", lambda name: name not in ("peft", "transformers") and installed(name))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    merge = small("merge", M=0)
    outcome = run(
        Target("", small("compile"), COMPILE, 1.0),
        Target("", small("train"), PEFT, 1.0),
        Target("", merge, COPY, 1e6, at_most=True),
        Target("", merge, PEFT, 1.0),
        Target("", small("model", M=21), PLAIN_MODEL, 1.0),
        Target("", small("decode", M=1), PLAIN_MODEL, 1.0),
    )
    compiled, train, copies, peft, whole, decode = outcome.results
    assert copies.mark == PASS
    assert {r.mark for r in (compiled, train, peft, whole, decode)} == {NOT_MEASURED}
    assert "C++ compiler" in compiled.note
    assert "peftk[bench]" in train.note
    assert "peftk[bench]" in peft.note
    assert "peftk[demo]" in whole.note
    assert "peftk[demo]" in decode.note
    assert outcome.all_correct
    (left_out,) = run(TARGETS[next(i for i, t in enumerate(TARGETS) if t.peer == COMPILE)], compile=False).results
    assert (left_out.mark, left_out.note) == (NOT_MEASURED, "skipped by --no-compile")


# ---- the command ----------------------------------------------------------------------------------------------------


def test_suite_writes_json_csv_and_markdown(tmp_path):
    files = {kind: tmp_path / "made" / f"suite.{kind}" for kind in ("json", "csv", "markdown")}
    written = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    result = invoke("--suite", "cpu", "--dims", "64", "--repeats", "2", "--seconds", "0.1", *written)
    assert result.exit_code == 0, result.output  # also if targets are missed
    assert "of 4 targets met" in result.output
    report = json.loads(files["json"].read_text())
    assert {"fp32_gflops", "bf16_gflops", "read_gbytes", "simd_level"} <= report["roofline"].keys()
    assert report["options"]["dims"] == [[64, 64]]
    fields = [field.name for field in dataclasses.fields(suite.Result)]
    for target in report["targets"]:
        assert list(target) == fields
        assert target["mark"] in (PASS, SHORT)
        assert target["ratio"] == pytest.approx(target["median_us"] / target["peer_us"])
        assert target["peft"] > 0
    assert {record["side"] for record in report["records"]} == {LINEAR, PEFT, "peftk cpu"}
    with files["csv"].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert (list(rows[0]), len(rows)) == (fields, 4)
    markdown = files["markdown"].read_text()
    assert markdown.count("| nn.Linear |") == 4
    assert "| ratio | target |" in markdown


def test_suite_finds_a_wrong_side(monkeypatch, tmp_path):
    peftk_layer = lora_linear.peftk_layer
    monkeypatch.setattr(lora_linear, "peftk_layer", lambda linear, A, B, *rest: peftk_layer(linear, A, 1.05 * B, *rest))
    file = tmp_path / "suite.json"
    chosen = ["--op", "lora_linear", "--dims", "64", "--dtype", "bf16"]
    result = invoke("--suite", "cpu", *chosen, "--repeats", "1", "--json", str(file))
    assert result.exit_code == 1
    assert "FAIL" in result.output
    (target,) = json.loads(file.read_text())["targets"]
    assert (target["mark"], target["ratio"]) == (WRONG, None)
    assert "peftk cpu is wrong by" in target["note"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-compile"], "--no-compile: only with --suite"),
        (["--markdown", "x.md"], "--markdown: only with --suite"),
        (["--op", "model"], "--op model: only with --suite"),
        (["--suite", "cpu", "--backend", "cpu"], "--backend: not with --suite cpu"),
        (["--suite", "cpu", "--plot", "x.png"], "--plot: not with --suite cpu"),
        (["--suite", "cpu", "--device", "cuda"], "--device cuda: not with --suite cpu"),
        (["--suite", "gpu"], "gpu"),
    ],
)
def test_options_that_do_not_fit(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


# ---- the probes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [1, 7, 64, 4097, 100_003])
def test_read_peak_reads_every_word(level, words):
    memory = torch.randint(-(2**62), 2**62, (words,))
    expected = sum(memory.tolist()) % 2**64
    assert {_cpu.read_peak(memory.data_ptr(), 8 * words, threads) for threads in (1, 3)} == {expected}


def test_fma_peak_does_the_work(level):
    """Ten times the work takes longer: the compiler has not removed it."""
    for code in (0, 1):
        few, many = (min(_seconds(work, code) for _ in range(5)) for work in (1 << 20, 10 << 20))
        assert many > 3 * few


def _seconds(multiply_adds: int, dtype: int) -> float:
    started = time.perf_counter()
    _cpu.fma_peak(multiply_adds, dtype, 1)
    return time.perf_counter() - started
