"""Runs the files of tests/kernels/cuda/on_host/, in which csrc/cuda, compiled by g++ and run under the sanitizers, is
peftk's CUDA module.

They compare it with the fp64 reference, with the bits of the reference merge and with the specification of segments,
and run the checks of `peftk selftest --device cuda`. In the default tier they share a process, which takes seconds to
start under the sanitizers.
"""

from __future__ import annotations

import pytest

from tests.support.host_cuda import needs_host_cuda, run
from tests.support.paths import ROOT
from tests.support.tiers import FULL, LONG

pytestmark = needs_host_cuda

FOLDER = ROOT / "tests/kernels/cuda/on_host"
STEMS = sorted(path.stem for path in FOLDER.glob("*.py") if "def test_" in path.read_text())
RUNS = [pytest.param(STEMS, "default", id="default")] + [
    pytest.param([stem], tier, marks=mark, id=f"{stem}-{tier}")
    for tier, mark in (("full", FULL), ("long", LONG))
    for stem in STEMS
]


@pytest.mark.parametrize(("stems", "tier"), RUNS)
def test_on_the_host(stems: list[str], tier: str) -> None:
    run(tier, *stems)
