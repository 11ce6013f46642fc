"""The commands bench and selftest, and what all commands say if something is missing. For demo see test_demo.py, for
study tests/tools/study."""

from __future__ import annotations

import csv
import dataclasses
import json
import os

import pytest
import torch
from click.testing import CliRunner

from peftk.backends import choice, reference
from peftk.cli import main
from peftk.reference import bounds
from peftk.reference.lora_linear import lora_linear as reference_lora_linear
from peftk.system import extras, timing
from peftk.tools.benchmark import lora_linear
from peftk.tools.benchmark.common import Record, Shape
from peftk.tools.selftest import parity
from tests.support.tiers import FULL

TINY = ["--dims", "48,24x40", "--tokens", "3", "--ranks", "2,4", "--adapters", "2", "--repeats", "2"]


def invoke(*arguments: str):
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("command", [(), ("demo",), ("bench",), ("selftest",), ("study",)])
def test_help(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_bench_writes_json_csv_and_plot(tmp_path):
    files = {kind: tmp_path / "made" / f"bench.{kind}" for kind in ("json", "csv", "png")}
    result = invoke(
        *["bench", *TINY, "--backend", "reference", "--op", "lora_linear,multi_lora_linear,train,merge,unmerge"],
        *["--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"])],
    )
    assert result.exit_code == 0, result.output
    assert "nn.Linear is torch's layer without any adapter" in result.output

    report = json.loads(files["json"].read_text())
    assert {"cpu", "threads", "torch", "peft", "peftk", "serving", "python"} <= report["environment"].keys()
    records = report["records"]
    fields = [field.name for field in dataclasses.fields(Record)]
    assert all(list(record) == fields for record in records)
    sides = {"nn.Linear", "HF PEFT", "peftk reference"}
    for op, first in [("lora_linear", "nn.Linear"), ("multi_lora_linear", "nn.Linear"), ("train", "nn.Linear")]:
        assert {r["side"] for r in records if r["op"] == op} == sides
        assert {r["baseline"] for r in records if r["op"] == op} == {first}
    assert {r["side"] for r in records if r["op"] == "merge"} == {"copy of W", "HF PEFT", "peftk reference"}
    assert {(r["K"], r["N"]) for r in records} == {(48, 48), (24, 40)}
    assert {r["dtype"] for r in records} == {"bf16", "fp32"}
    # 2 dtypes, 2 shapes: lora_linear, train, merge and unmerge at 2 ranks; multi_lora_linear at 1 number of adapters
    assert len(records) == 2 * 2 * 3 * (2 + 2 + 2 + 2 + 1)
    for record in records:
        assert record["passed"]
        assert record["error"] <= 1
        rounding = 1 + 1e-12  # of the quantiles, which are interpolated
        assert record["p10_us"] <= record["median_us"] * rounding
        assert record["median_us"] <= record["p90_us"] * rounding
        assert record["repeats"] == 2
    ours = next(r for r in records if r["side"] == "peftk reference")
    linear = next(r for r in records if r["side"] == "nn.Linear")
    assert ours["over_baseline"] == pytest.approx(linear["median_us"] / ours["median_us"])

    with files["csv"].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == fields
    assert len(rows) == len(records)
    assert files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mistake", ["forgets the adapter", "scales it by 1.05", "NaN", "one wrong element"])
def test_bench_refuses_to_time_a_wrong_side(tmp_path, monkeypatch, mistake):
    def wrong(x, weight, bias, adapter, **kwargs):
        if mistake == "forgets the adapter":
            adapter = None
        elif mistake == "scales it by 1.05":
            adapter = dataclasses.replace(adapter, scaling=adapter.scaling * 1.05)
        y, z = reference_lora_linear(x, weight, bias, adapter, **kwargs)
        if mistake == "NaN":
            y[0] = float("nan")
        elif mistake == "one wrong element":
            y[-1, -1] *= 1.1
        return y, z

    monkeypatch.setattr(reference, "lora_linear", wrong)
    file = tmp_path / "bench.json"
    result = invoke("bench", *TINY, "--op", "lora_linear", "--backend", "reference", "--json", str(file))
    assert result.exit_code == 1
    assert "FAIL" in result.output
    for record in json.loads(file.read_text())["records"]:
        if record["side"] == "peftk reference":
            assert not record["passed"]
            assert record["median_us"] is None
            assert record["over_baseline"] is None
        else:
            assert record["passed"]
            assert record["median_us"] > 0


def test_bench_refuses_a_backend_that_cannot_serve(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = invoke("bench", *TINY, "--op", "lora_linear", "--backend", "cuda")
    assert result.exit_code == 1
    assert "cuda" in result.output
    assert "Traceback" not in result.output


def test_bench_says_when_no_compiled_backend_can_run(monkeypatch):
    cannot_run = choice.cannot_run
    monkeypatch.setattr(
        choice, "cannot_run", lambda name, call: "not built" if name == "cpu" else cannot_run(name, call)
    )
    result = invoke("bench", *TINY, "--op", "lora_linear")
    assert result.exit_code == 1
    assert "cpu: not built" in result.output
    assert "--backend reference" in result.output


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--ranks", "0", "0 is less than 1"),
        ("--ranks", "4,x", "'4,x'"),
        ("--dims", "4096x", "neither K nor KxN"),
        ("--dtype", "int8", "not one of bf16, fp16, fp32"),
        ("--op", "nothing", "not one of lora_linear"),
        ("--backend", "mkl", "not one of reference"),
        ("--threads", "0", "--threads"),
    ],
)
def test_bench_bad_options(option, value, said):
    result = invoke("bench", option, value)
    assert result.exit_code == 2
    assert said in result.output


def test_missing_extras_name_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "is_installed", lambda module: module not in ("transformers", "matplotlib"))
    result = invoke("demo", "--out", str(tmp_path / "demo"))
    assert result.exit_code == 1
    assert "transformers, matplotlib" in result.output
    assert "pip install 'peftk[demo]'" in result.output
    result = invoke("bench", *TINY, "--plot", str(tmp_path / "bench.png"))
    assert result.exit_code == 1
    assert "pip install 'peftk[bench]'" in result.output
    assert not list(tmp_path.iterdir())


def test_bench_without_peft_leaves_its_column_out(monkeypatch):
    installed = extras.is_installed
    monkeypatch.setattr(extras, "is_installed", lambda module: module != "peft" and installed(module))
    result = invoke("bench", *TINY, "--op", "lora_linear", "--backend", "reference")
    assert result.exit_code == 0, result.output
    assert "HF PEFT" not in result.output.split("lora_linear:", 1)[1]


def test_selftest_finds_a_wrong_backend(monkeypatch):
    monkeypatch.setattr(
        reference,
        "lora_linear",
        lambda x, weight, bias, adapter, **kwargs: reference_lora_linear(x, weight, None, adapter, **kwargs),
    )
    monkeypatch.setattr(parity, "DTYPES", (torch.float32,))
    result = invoke("selftest")
    assert result.exit_code == 1
    assert "FAIL" in result.output
    assert "reference lora_linear" in result.output


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,), pytest.param(parity.DTYPES, marks=FULL)], ids=["one dtype", "all"]
)
def test_selftest_passes_and_writes_a_report(dtypes, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "DTYPES", dtypes)
    result = invoke("selftest", "--out", str(tmp_path / "made"))
    assert result.exit_code == 0, result.output
    assert "All passed" in result.output
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["passed"]
    assert report["environment"]["target"] == "cpu"
    assert {o["section"] for o in report["outcomes"]} == {"parity"}
    assert all(0 <= o["error"] <= 1 for o in report["outcomes"])
    assert "All passed" in (tmp_path / "made" / "report.txt").read_text()
    assert str(tmp_path / "made" / "report.json") in result.output.replace("\n", "")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets")
def test_selftest_rehearses_only_where_triton_interprets():
    pytest.importorskip("triton")
    result = invoke("selftest", "--device", "interpreter")
    assert result.exit_code == 1
    assert "triton was imported before, without TRITON_INTERPRET=1" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["bench", "selftest"])
def test_cuda_where_there_is_none(command):
    result = invoke(command, "--device", "cuda")
    assert result.exit_code == 1
    assert "expected a CUDA GPU" in result.output


def test_bound_detects_the_adapter():
    for dtype in ("bf16", "fp16", "fp32"):
        case = lora_linear.case(Shape("lora_linear", dtype, 4, 96, 64, 8, 1), "cpu", ["reference"])
        assert case.sensitivity > 8


def test_bound_is_that_of_the_tests():
    from tests.support import numerics

    x, weight, A, B = (torch.randn(5, 7), torch.randn(6, 7), torch.randn(3, 7), torch.randn(6, 3))
    expected = bounds.forward(x, weight, None, A, B, 2.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        same = numerics.bound(expected.value, expected.magnitude, 7, dtype)
        assert torch.equal(expected.allowed(dtype, fused=True), same)
        # and it is the bound that docs/numerics.md states
        u = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[dtype]
        accumulated = 2.0 * 7**0.5 * 2.0**-24 * expected.magnitude
        stated = u * expected.value.abs() + (1 + u) * accumulated
        torch.testing.assert_close(same, stated, rtol=1e-9, atol=2.0**-24)  # atol: the smallest fp16


def test_interleave_takes_turns_and_resets_untimed():
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleave(sides, seconds=60, repeats=4, reset={"a": lambda: order.append("-")})
    assert "".join(order) == "a-b" + "a-b" + "ba-" + "a-b" + "ba-"  # once untimed, then four in rotating order
    assert times["a"].repeats == times["b"].repeats == 4


def test_interleave_keeps_to_its_time():
    import time

    times = timing.interleave({"slow": lambda: time.sleep(0.02)}, seconds=0.01)
    assert times["slow"].repeats == 1
    assert times["slow"].median_us >= 20_000
    times = timing.interleave({"quick": lambda: time.sleep(0.001)}, seconds=0.02)
    assert 3 <= times["quick"].repeats < 20
