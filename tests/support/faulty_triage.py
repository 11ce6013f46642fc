"""Groups of a triage whose checks hang, crash and fail, and the process that runs one of them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from peftk.tools.selftest.check import Check, Found, Target, WrongError
from peftk.tools.triage import process
from peftk.tools.triage.group import Group
from peftk.tools.triage.worker import work


def passes() -> Found:
    return Found(0.5, {"row": "M=3", "us": {"nn.Linear": {"median": 1.25}}})


def fails() -> float:
    raise WrongError("y: bits differ")


def crashes() -> float:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0.0


def hangs() -> float:
    print("about to hang", flush=True)
    time.sleep(600)
    return 0.0


def _checks(*runs: Callable[[], float | Found]) -> Callable[[Target], Iterator[Check]]:
    return lambda target: (Check("triage", "none", "op", run.__name__, run) for run in runs)


GROUPS = {
    "failing": Group("failing", "one fails", _checks(passes, fails, passes)),
    "crashing": Group("crashing", "one crashes", _checks(passes, crashes, passes)),
    "hanging": Group("hanging", "one hangs", _checks(passes, hangs, passes), check_limit=6.0),
}


def command(device: str, group: Group, file: Path) -> list[str]:
    """Starts one of `GROUPS` as the triage starts its own, and its own as ever."""
    if group.name not in GROUPS:
        return process.worker(device, group, file)
    return [sys.executable, "-m", "tests.support.faulty_triage", device, group.name, str(file.absolute())]


if __name__ == "__main__":
    work(GROUPS[sys.argv[2]], Target(sys.argv[1], "cpu", ()), Path(sys.argv[3]))
