"""`peftk demo`: every step, its checks and its files."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from peftk.cli import main
from peftk.system import extras
from peftk.system.timing import interleave
from peftk.tools import demo, smollm2
from peftk.tools.demo import latency, mixed_batch, serving, styles
from peftk.tools.demo.stage import Stage, sparkline
from peftk.tools.minilm import MiniLM
from peftk.tools.sentences import KINDS, SENTENCES, split
from tests.support import served_llama

# one thread: steady timings while other tests run
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


STEPS = ("unchanged", "HF PEFT", "alone", "loss fell", "bits")  # words in the names of each step's checks


def test_every_step_with_a_sixth_of_the_model(tmp_path, monkeypatch):
    """With one layer of six and short timings: the results are right, even if such a model learns little."""
    original_init = MiniLM.__init__

    def cut(minilm):
        original_init(minilm)
        del minilm.plain.encoder.layer[1:]

    monkeypatch.setattr(MiniLM, "__init__", cut)
    for step in (latency, mixed_batch):
        monkeypatch.setattr(step, "interleave", lambda sides, seconds: interleave(sides, seconds=0.01))
    monkeypatch.setattr(serving, "why_not", lambda: "no language model")
    demo.run(tmp_path, Console(quiet=True), quick=True)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["inject"]["linears"] == 6
    assert report["serving"] == {"skipped": "no language model"}
    assert all(any(step in check["name"] for check in report["checks"]) for step in STEPS)
    of_the_whole_model = ("loss fell", "what the adapters change")
    wrong = [c for c in report["checks"] if not (c["passed"] or any(name in c["name"] for name in of_the_whole_model))]
    assert not wrong, wrong
    assert all(figures["bits_changed"] == 0 for figures in report["merge"].values())


def test_every_style_is_told_from_the_others():
    for style in styles.STYLES:
        answers = [styles.example(style, country)[1] for country in styles.COUNTRIES]
        assert all(answer.endswith("<|im_end|>") and "{" not in answer.strip("{") for answer in answers)
        for answer in answers:
            assert [other for other in styles.STYLES if styles.shows(other, answer)] == [style]
    assert len(set(styles.COUNTRIES)) == 20
    assert not any("Italy" in country for country in styles.COUNTRIES)


def test_adapters_trained_in_one_batch_are_served_in_one(monkeypatch):
    pytest.importorskip("transformers", "5.24", reason="the engine is for transformers 5.24")
    made = smollm2.random_llama(torch.float32, hidden=64, layers=2)._replace(tokenizer=served_llama.tokenizer())
    monkeypatch.setattr(smollm2, "why_not", lambda: None)
    monkeypatch.setattr(smollm2, "load", lambda dtype: made._replace(model=copy.deepcopy(made.model)))
    monkeypatch.setattr(serving, "QUICK_STEPS", 6)
    stage = Stage(Console(file=io.StringIO()), quick=True, has_peft=True)
    serving.show(stage)
    assert stage.passed
    figures = stage.figures["serving"]
    assert figures["losses"][-1] < figures["losses"][0]
    assert list(figures["answers"]) == ["base", *styles.STYLES]
    assert figures["tokens"] > len(styles.STYLES)


@pytest.mark.full
def test_eight_styles_of_smollm2():
    pytest.importorskip("transformers", "5.24", reason="the engine is for transformers 5.24")
    if reason := smollm2.why_not():
        pytest.skip(reason)
    result = CliRunner().invoke(main, ["demo", "--serving"])
    assert result.exit_code == 0, result.output
    assert "✓ adapters that did not learn their style" in result.output


@pytest.mark.full
def test_demo_quick(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "peftk.cli", "demo", "--quick", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checks passed" in result.stdout
    assert not result.stderr, result.stderr
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((out / "demo.json").read_text())
    assert report["passed"]
    assert report["quick"]
    names = " ".join(check["name"] for check in report["checks"])
    assert all(step in names for step in STEPS)
    assert report["inject"]["linears"] == 36
    assert {row["dtype"] for row in report["latency"]["rows"]} == {"fp32", "bf16"}
    for row in report["latency"]["rows"]:
        assert row["plain_ms"] > 0
        assert row["peft_ms"] > 0
        assert row["peftk_ms"] > 0
        assert row["adapter_effect"] > 5 * row["peftk_against_peft"]
    assert report["mixed_batch"]["ranks"] == [1, 3, 16, 64]
    training = report["training"]
    assert training["losses"][-1] < training["losses"][0]
    assert training["accuracy_after"] > training["accuracy_before"]
    for figures in report["merge"].values():
        assert figures["bits_changed"] == 0
        assert figures["receipt_mib"] > 0
        assert figures["peft_weights_changed"] > 0  # which an exact unmerge avoids
    assert {"cpu", "threads", "torch", "peft", "serving"} <= report["environment"].keys()


@pytest.mark.full
def test_demo_without_peft(tmp_path, monkeypatch):
    installed = extras.is_installed
    monkeypatch.setattr(extras, "is_installed", lambda module: module != "peft" and installed(module))
    result = CliRunner().invoke(main, ["demo", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "peft is not installed" in result.output
    assert "peft_ms" not in json.loads((tmp_path / "demo.json").read_text())["latency"]["rows"][0]


def test_sentences():
    assert len({sentence.text for sentence in SENTENCES}) == len(SENTENCES) == 108
    train, held_out = split()
    assert not {s.text for s in train} & {s.text for s in held_out}
    for sentences in (train, held_out):
        counts = [sum(s.kind == kind for s in sentences) for kind in KINDS]
        assert len(set(counts)) == 1


def test_sparkline():
    assert sparkline([2.0, 1.0, 0.0]) == "█▅▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
