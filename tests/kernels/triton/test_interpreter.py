"""Runs the files of `tests/kernels/triton/interpreted/` in processes with TRITON_INTERPRET=1.

It must be set before triton is imported. In the default tier several files share a process, since imports would take
longer than the tests; in the other tiers each file has its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.tiers import FULL, LONG, MARKERS, judge

pytest.importorskip("triton")

FOLDER = Path(__file__).with_name("interpreted")
STEMS = sorted(path.stem for path in FOLDER.glob("*.py") if "def test_" in path.read_text())
TOGETHER = (
    (
        "lora_linear",
        "lora_wgrad",
        "backward",
        "packed",
        "adapter_block",
        "gemm",
        "autocast",
        "field",
        "serving_shapes",
        "segments",
        "merge",
    ),
    (
        "behaviour",
        "triage",
        "compiled",
        "tuner",
        "counted",
        "counting",
        "interleaving",
        "interleaving_lora_linear",
        "interleaving_lora_wgrad",
    ),
)
RUNS = [pytest.param(stems, "default", id=f"{stems[0]}-default") for stems in TOGETHER] + [
    pytest.param((stem,), tier, marks=mark, id=f"{stem}-{tier}")
    for tier, mark in (("full", FULL), ("long", LONG))
    for stem in STEMS
]


def test_every_file_is_run() -> None:
    assert sorted(stem for stems in TOGETHER for stem in stems) == STEMS


@pytest.mark.parametrize(("stems", "tier"), RUNS)
def test_in_the_interpreter(stems: tuple[str, ...], tier: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", MARKERS[tier], "-W", "ignore::RuntimeWarning"]
    done = subprocess.run(
        [*command, *(str(FOLDER / f"{stem}.py") for stem in stems)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    judge(done, tier)
