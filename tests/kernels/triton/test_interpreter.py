"""Runs each file of `tests/kernels/triton/interpreted/` in a process where TRITON_INTERPRET=1 was set before triton is
imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.tiers import MARKERS, TIERS, judge

pytest.importorskip("triton")

FILES = Path(__file__).with_name("interpreted").glob("*.py")
STEMS = sorted(path.stem for path in FILES if "def test_" in path.read_text())


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("stem", STEMS)
def test_in_the_interpreter(stem: str, tier: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", MARKERS[tier], "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [*command, f"tests/kernels/triton/interpreted/{stem}.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    judge(done, tier)
