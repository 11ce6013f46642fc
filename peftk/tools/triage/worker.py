"""What runs in the process of a group: its checks, one after the other, each on disk before the next begins."""

from __future__ import annotations

import faulthandler
import time
from pathlib import Path

from peftk.tools.selftest.check import Outcome, Target, gpu_lost, perform
from peftk.tools.triage import records
from peftk.tools.triage.group import Group

_BEFORE_THE_END = 2.0  # seconds before a check's time is up when the log gets the stacks of all threads


def work(group: Group, target: Target, file: Path) -> None:
    """Runs the group's checks and appends to its file. After one that made the GPU unusable, the others do not run."""
    faulthandler.enable()
    started = time.monotonic()
    lost: str | None = None
    with file.open("a", encoding="utf-8") as stream:
        for check in group.checks(target):
            records.write(stream, records.running(check))
            faulthandler.dump_traceback_later(max(group.check_limit - _BEFORE_THE_END, group.check_limit / 2))
            result = perform(check) if lost is None else Outcome(*check[:4], not_run=lost)
            if result.failed and lost is None and target.device == "cuda":
                lost = gpu_lost(check)
            records.write(stream, records.outcome(result))
        records.write(stream, {"done": True, "seconds": round(time.monotonic() - started, 1)})
    faulthandler.cancel_dump_traceback_later()
