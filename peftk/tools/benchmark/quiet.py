"""How quiet the machine is during a measurement: the share of time in which a thread that was ready did not run.

Linux counts for every thread how long it waited for a core, and for the machine how much time the hypervisor took
from its cores ("steal"). Reading both before and after a measurement does not disturb it, as a probe thread would.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

# Above this share timings say more about the other programs than about the sides: no verdict.
MOST = 0.05


class Counters(NamedTuple):
    clock: float  # seconds
    waited: dict[str, float]  # seconds by thread of this process
    stolen: float  # seconds per core


def read(proc: Path = Path("/proc")) -> Counters | None:
    """None where the system has no such counters."""
    try:
        waited = {task.name: _waited(task) for task in (proc / "self/task").iterdir()}
        label, *ticks = (proc / "stat").read_text().split("\n", 1)[0].split()
        stolen = int(ticks[7]) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)
    except (OSError, ValueError, IndexError):
        return None
    return Counters(time.perf_counter(), waited, stolen) if label == "cpu" else None


def _waited(task: Path) -> float:
    """The second number of schedstat: the time in which the thread was ready and did not run, in ns."""
    try:
        return int((task / "schedstat").read_text().split()[1]) / 1e9
    except FileNotFoundError:
        if (task / "comm").exists():
            raise  # a kernel without these statistics
        return 0.0  # the thread has ended


class Watch:
    """Begins when it is made."""

    def __init__(self) -> None:
        self._begin = read()

    def not_run(self) -> float | None:
        """The share of time since the beginning in which the thread of this process that waited most for a core did
        not run, and the share that was stolen. None if it is not known."""
        begin, end = self._begin, read()
        return None if begin is None or end is None else share(begin, end)


def share(begin: Counters, end: Counters) -> float:
    waited = max((now - begin.waited.get(thread, 0.0) for thread, now in end.waited.items()), default=0.0)
    return (waited + end.stolen - begin.stolen) / max(end.clock - begin.clock, 1e-9)


def is_quiet(not_run: float | None) -> bool:
    return not_run is None or not_run <= MOST
