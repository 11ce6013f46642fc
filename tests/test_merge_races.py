"""csrc/cuda/merge.cu under the race detector: none, and without any one of its barriers there is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.host_cuda import HOST, REPORT, ROOT, executed, needs_host_cuda, program

pytestmark = needs_host_cuda

SOURCES = [HOST / "merge_races.cpp", ROOT / "csrc/cuda/merge.cu"]


def shown(seeds: int, mutants: dict[str, str] | None = None) -> str | None:
    """A report's first line, "wrong" for wrong results without one, or None."""
    done = executed(program(SOURCES, "thread", mutants), seeds)
    report = REPORT.search(done.stderr)
    assert report or done.returncode in (0, 1), done.stderr
    return report[0] if report else "wrong" if done.returncode else None


def test_there_is_no_race() -> None:
    assert shown(1) is None


@pytest.mark.full
def test_there_is_no_race_in_any_of_many_schedules() -> None:
    assert shown(20) is None


@pytest.mark.full
@pytest.mark.parametrize("path", ["csrc/cuda/merge.cu", "csrc/cuda/merge_tile.cuh"])
def test_every_barrier_is_needed(path: str) -> None:
    """Without it there is a race; or an index that was not yet written leads nowhere."""
    text = Path(ROOT, path).read_text()
    barriers = [match.span() for match in re.finditer(r"__syncthreads\(\);", text)]
    assert barriers
    for begin, end in barriers:
        report = shown(3, {path: f"{text[:begin]};{text[end:]}"})
        assert report is not None, f"line {text[:begin].count(chr(10)) + 1}"
        assert report.startswith(("ThreadSanitizer: data race", "ThreadSanitizer: SEGV")), report
