"""How quiet the machine was: the counters, and a process that shares its core."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from peftk.tools.benchmark import quiet
from peftk.tools.benchmark.contended import busy
from peftk.tools.benchmark.quiet import MOST, Counters, is_quiet, read, share


def proc(folder: Path, waited_ns: dict[str, int], steal: int) -> Path:
    for thread, waited in waited_ns.items():
        task = folder / "self/task" / thread
        task.mkdir(parents=True)
        (task / "comm").write_text("python")
        (task / "schedstat").write_text(f"123456 {waited} 7\n")
    (folder / "stat").write_text(f"cpu  1 2 3 4 5 6 7 {steal} 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n")
    return folder


def test_counters(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
    counters = read(proc(tmp_path, {"10": 2_000_000_000, "11": 500_000_000}, 3 * ticks))
    assert counters is not None
    assert (counters.waited, counters.stolen) == ({"10": 2.0, "11": 0.5}, 3.0)


def test_a_thread_that_ended_counts_nothing(tmp_path: Path) -> None:
    (proc(tmp_path, {"10": 10**9}, 0) / "self/task/11").mkdir()
    counters = read(tmp_path)
    assert counters is not None
    assert counters.waited == {"10": 1.0, "11": 0.0}


def test_no_counters(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    (proc(tmp_path, {"10": 1}, 0) / "self/task/10/schedstat").unlink()
    assert read(tmp_path) is None


def test_share() -> None:
    """The longest wait and steal count. Waits before the beginning do not count, nor threads that ended."""
    begin = Counters(100.0, {"10": 5.0, "11": 7.0}, 1.0)
    assert share(begin, Counters(110.0, {"10": 5.5, "12": 0.75}, 1.25)) == pytest.approx(0.1)
    assert share(begin, begin._replace(clock=110.0)) == 0


def test_what_is_quiet() -> None:
    assert is_quiet(None)
    assert is_quiet(MOST)
    assert not is_quiet(MOST + 0.001)


def test_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "read", lambda: None)
    assert quiet.Watch().not_run() is None


@pytest.mark.skipif(quiet.read() is None, reason="this system has no such counters")
def test_a_shared_core_is_not_quiet() -> None:
    shares = []

    def share_a_core() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # this thread, and the process that it starts
        with busy(1):
            watch, end = quiet.Watch(), time.perf_counter() + 0.5
            while time.perf_counter() < end:
                pass
            shares.append(watch.not_run())

    thread = threading.Thread(target=share_a_core)
    thread.start()
    thread.join()
    assert shares[0] is not None
    assert shares[0] > 4 * MOST
