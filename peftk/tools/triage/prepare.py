"""Compiles the Triton kernels of all groups by all cores, before the groups run one after the other.

Each of several processes runs a share of the groups' checks on a stand-in for the GPU (`stand_in`), where a launch is
compiled and nothing is computed. So what is compiled, and Triton's key for it, are those of the launches to come. It
needs no GPU: `ahead` does the same on another machine.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from peftk.launch import merge_layers
from peftk.reference import bounds
from peftk.reference.receipt import MergeReceipt, code_as_bytes
from peftk.tools.selftest import behaviour, parity
from peftk.tools.selftest.behaviour import Results
from peftk.tools.selftest.check import Check, Found, NotRunError, Target, perform
from peftk.tools.selftest.work import Work
from peftk.tools.triage import correctness, stand_in, timing
from peftk.tools.triage.environment import compiled_kernels
from peftk.tools.triage.group import Group

_MOST = 16  # processes
BACKENDS = ("triton", "gemm")


def group(name: str, groups: Sequence[str], *, limit: float) -> Group:
    """A group that compiles the kernels of other groups, named here."""

    def compile_all(target: Target) -> Found:
        if target.is_rehearsal:
            raise NotRunError("Triton's interpreter compiles nothing")
        from triton import knobs

        return by_all_cores(groups, capability(), Path(knobs.cache.dir))

    def checks(target: Target) -> Iterator[Check]:
        yield Check("triage", "triton", "compile", "the kernels of other groups", lambda: compile_all(target))

    return Group(name, "kernels compiled by all cores", checks, limit=limit, check_limit=limit)


def capability() -> int:
    """The compute capability of the GPU here, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def by_all_cores(groups: Sequence[str], target: int, cache: Path) -> Found:
    """Compiles the groups' kernels for GPUs of a compute capability into a cache of Triton's, if it lacks them."""
    count = min(len(os.sched_getaffinity(0)), _MOST)
    before, started = compiled_kernels(cache), time.monotonic()
    command = [sys.executable, "-m", "peftk.tools.triage", "compile", ",".join(groups), str(target)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}  # only the stand-in
    shares = [subprocess.Popen([*command, f"{share}/{count}"], env=environment) for share in range(count)]
    failed = sum(share.wait() != 0 for share in shares)
    found = {"processes": count, "compiled": len(compiled_kernels(cache) - before), "cached before": len(before)}
    figures = {**found, "seconds": round(time.monotonic() - started, 1)}
    return Found(0.0, figures, f"{failed} of {count} processes failed; the log has their words" if failed else None)


def compile_share(groups: Iterable[Group], target: int, share: int, shares: int) -> list[str]:
    """Compiles what a share of the groups' checks launches; returns what the checks say that did not get to their end.

    For a process of its own: torch and peftk remember what GPU they have seen.
    """
    with stand_in.gpu(target), once():
        checks = share_of(groups, Target("cuda", "cuda", BACKENDS), share, shares)
        return [str(outcome) for outcome in map(perform, checks) if outcome.failed]


def share_of(groups: Iterable[Group], target: Target, share: int, shares: int) -> Iterator[Check]:
    """Every `shares`-th of all checks of the groups, from number `share` on."""
    checks = itertools.chain.from_iterable(group.checks(target) for group in groups)
    return itertools.islice(checks, share, None, shares)


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Inside, checks make each kind of call once, compare nothing and time nothing."""
    replacements: dict[Any, dict[str, Any]] = {
        behaviour: {"capture_graph": _rerun, "streams": lambda count: [contextlib.nullcontext] * count},
        correctness: {"RUNS": 1},
        timing: {"cuda_events": lambda: None, "measure": lambda *_, **__: [], "interleave": lambda *_, **__: {}},
        bounds: {"error": lambda *_, **__: 0.0},
        Work: {"error": _only_run},
        merge_layers: {"code_as_bytes": _with_a_raw_weight},
        torch: {"compile": lambda layer, **_: layer},
    }
    with contextlib.ExitStack() as stack:
        for module in (behaviour, correctness, parity):
            stack.enter_context(mock.patch.object(module, "require_same_bits"))
        for owner, functions in replacements.items():
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(owner, name, function))
        yield


def _only_run(work: Work, results: Results | None = None) -> float:
    if results is None:
        work.run()
    return 0.0


def _rerun(run: Callable[[], Results]) -> tuple[Results, Callable[[], Results]]:
    return run(), run


def _with_a_raw_weight(receipt: MergeReceipt) -> tuple[Tensor, Tensor]:
    """Without one, which depends on the weights' values, restore_kernel is not launched."""
    code, places = code_as_bytes(receipt)
    return code, places.new_zeros(1)
