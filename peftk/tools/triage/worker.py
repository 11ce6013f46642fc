"""What runs in the process of a group: its checks, one after the other, each on disk before the next begins."""

from __future__ import annotations

import contextlib
import faulthandler
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftk.tools.selftest.check import Outcome, Target, gpu_lost, perform
from peftk.tools.triage import records
from peftk.tools.triage.group import Group

_BEFORE_THE_END = 2.0  # seconds before a check's time is up when the log gets the stacks of all threads


def work(group: Group, target: Target, file: Path) -> None:
    """Runs the group's checks and appends to its file. After one that made the GPU unusable, the others do not run."""
    faulthandler.enable()
    started = time.monotonic()
    lost: str | None = None
    with file.open("a", encoding="utf-8") as stream, compilations() as compiled:
        for check in group.checks(target):
            records.write(stream, records.running(check))
            faulthandler.dump_traceback_later(max(group.check_limit - _BEFORE_THE_END, group.check_limit / 2))
            result = perform(check) if lost is None else Outcome(*check[:4], not_run=lost)
            if result.failed and lost is None and target.device == "cuda":
                lost = gpu_lost(check)
            records.write(stream, records.outcome(result))
        seconds = round(time.monotonic() - started, 1)
        records.write(stream, {"done": True, "seconds": seconds, "compiled": compiled})
    faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the Triton kernels that are compiled inside, which Triton's cache did not have."""
    from triton import knobs

    compiled: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compiled.append(src.name)

    before, knobs.compilation.listener = knobs.compilation.listener, listen
    try:
        yield compiled
    finally:
        knobs.compilation.listener = before
