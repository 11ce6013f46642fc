"""The first group: what machine this is, what was built for it, and whether Triton finds its compiled kernels again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from peftk import functional
from peftk.tools.selftest import parity, report
from peftk.tools.selftest.check import Check, Found, NotRunError, Target, WrongError

CALL = "from peftk.tools.triage.environment import call; call()"


def checks(target: Target) -> Iterator[Check]:
    yield Check("triage", "torch", "environment", "versions and GPU", lambda: Found(0.0, report.describe(target)))
    for name in ("triton", "cuda"):
        yield Check("triage", name, "environment", "is built and runs here", lambda name=name: _runs(name, target))  # type: ignore[misc]
    yield Check("triage", "triton", "environment", "a compiled kernel is found again", lambda: _compiled(target))


def call() -> None:
    """One small call on the GPU, by Triton."""
    x, weight = (torch.ones(shape, device="cuda", dtype=torch.bfloat16) for shape in ((17, 128), (64, 128)))
    A, B = (torch.ones(shape, device="cuda", dtype=torch.bfloat16) for shape in ((16, 128), (64, 16)))
    functional.lora_linear(x, weight, None, A, B, backend="triton")
    torch.cuda.synchronize()


def _runs(backend: str, target: Target) -> float:
    reason = parity.cannot_run(backend, "lora_linear", target.device)
    if reason is not None:
        raise NotRunError(reason)
    return 0.0


def _compiled(target: Target) -> Found:
    if target.is_rehearsal:
        raise NotRunError("Triton's interpreter compiles nothing")
    from triton import knobs

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", CALL], env=os.environ, capture_output=True, text=True)
        if done.returncode:
            raise WrongError(f"a call in a new process: exit code {done.returncode}, {done.stderr.strip()[-400:]}")

    return check_found_again(run, Path(knobs.cache.dir))


def check_found_again(run: Callable[[], object], cache: Path) -> Found:
    """run: makes a call in a new process. Only its first run may compile; after that the kernel is in the cache."""
    compiled, seconds = [], []
    for _ in range(2):
        before, started = compiled_kernels(cache), time.monotonic()
        run()
        seconds.append(round(time.monotonic() - started, 2))
        compiled.append(len(compiled_kernels(cache) - before))
    if not compiled_kernels(cache):
        raise WrongError(f"{cache}: expected compiled kernels after a call, found none")
    if compiled[1]:
        raise WrongError(f"{cache}: the second process compiled {compiled[1]} kernels again")
    return Found(0.0, {"cache": str(cache), "compiled": compiled, "seconds": seconds})


def compiled_kernels(cache: Path) -> set[Path]:
    """The files of compiled kernels in Triton's cache."""
    return set(cache.rglob("*.cubin")) | set(cache.rglob("*.hsaco"))
