"""Compiles the Triton kernels of all groups by all cores, before the groups run one after the other.

Each of several processes runs a share of the groups' checks on the GPU, with every launch of a Triton kernel replaced
by its compilation. So what is compiled, and Triton's key for it, are exactly those of the later launch. What the checks
then say about results that nobody computed is not heard.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from peftk.tools.selftest.check import Check, Found, NotRunError, Target, perform
from peftk.tools.triage.environment import compiled_kernels
from peftk.tools.triage.group import Group

_MOST = 16  # processes: each has a context on the GPU


def checks(target: Target) -> Iterator[Check]:
    yield Check("triage", "triton", "compile", "the kernels of all groups", lambda: _compile(target))


def _compile(target: Target) -> Found:
    if target.is_rehearsal:
        raise NotRunError("Triton's interpreter compiles nothing")
    from triton import knobs

    count = min(len(os.sched_getaffinity(0)), _MOST)
    cache = Path(knobs.cache.dir)
    before, started = compiled_kernels(cache), time.monotonic()
    command = [sys.executable, "-m", "peftk.tools.triage", "compile"]
    shares = [subprocess.Popen([*command, str(share), str(count)]) for share in range(count)]
    failed = sum(share.wait() != 0 for share in shares)
    found = {"processes": count, "compiled": len(compiled_kernels(cache) - before)}
    figures = {**found, "seconds": round(time.monotonic() - started, 1)}
    return Found(0.0, figures, f"{failed} of {count} processes failed; the log has their words" if failed else None)


def compile_share(groups: Iterable[Group], target: Target, share: int, shares: int) -> None:
    """Compiles what a share of the groups' checks launches."""
    with compiling_only():
        for check in share_of(groups, target, share, shares):
            perform(check)


def share_of(groups: Iterable[Group], target: Target, share: int, shares: int) -> Iterator[Check]:
    """Every `shares`-th of all checks of the groups that compile, from number `share` on."""
    number = 0
    for group in (group for group in groups if group.compiles):
        for check in group.checks(target):
            if number % shares == share:
                yield check
            number += 1


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Inside, a launch of a Triton kernel compiles it and launches nothing."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Returns no kernel: a launcher would keep it, and launch it the next time."""
        run(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
