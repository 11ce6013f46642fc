"""contended: one layer beside busy processes, which take turns on the cores. How much slower is it than alone?

A call beside them takes a few times as long as alone, or some milliseconds if a thread has lost its core. So means are
compared here, not medians, and the slowdown of peftk's layer with that of nn.Linear.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from peftk.system.timing import Times, interleave
from peftk.tools.benchmark.common import Case, Record, Side
from peftk.tools.benchmark.quiet import Watch
from peftk.tools.benchmark.targets import BUSY, beside

_WARM_UP = 20


class Slowdown(NamedTuple):
    """Means in µs beside busy processes, and the slowdown of peftk's side over that of the other."""

    ours_us: float
    peer_us: float
    ratio: float


class Contended(NamedTuple):
    records: list[Record]
    slowdowns: dict[str, Slowdown]  # by peer of the target
    not_run: float | None  # while there was no busy process; see quiet.py


def measure(case: Case, seconds: float) -> Contended:
    """The sides take turns. case: nn.Linear and peftk's layer."""
    peer, ours = case.sides
    errors = {side.name: side.error() for side in case.sides}
    if max(errors.values()) > 1.0:
        return Contended([_record(case, side, side.name, errors, None) for side in case.sides], {}, None)
    watch = Watch()
    alone = _times(case, seconds)
    not_run = watch.not_run()
    records = [_record(case, side, side.name, errors, alone[side.name]) for side in case.sides]
    slowdowns = {}
    for processes in BUSY:
        with busy(processes):
            times = _times(case, seconds)
        slower = {side: its.mean_us / alone[side].mean_us for side, its in times.items()}
        name = beside(processes)
        slowdowns[name] = Slowdown(
            times[ours.name].mean_us, times[peer.name].mean_us, slower[ours.name] / slower[peer.name]
        )
        records.append(_record(case, peer, name, errors, times[peer.name]))
        records.append(_record(case, ours, name.replace(peer.name, ours.name), errors, times[ours.name]))
    return Contended(records, slowdowns, not_run)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that keep a core busy each."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(processes):
            running.append(subprocess.Popen(["sh", "-c", "echo; while :; do :; done"], stdout=subprocess.PIPE))
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()  # it has started
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()


def _times(case: Case, seconds: float) -> dict[str, Times]:
    with torch.inference_mode():
        for side in case.sides:
            for _ in range(_WARM_UP):
                side.run()
        return interleave({side.name: side.run for side in case.sides}, seconds=seconds, repeats=sys.maxsize)


def _record(case: Case, side: Side, name: str, errors: dict[str, float], times: Times | None) -> Record:
    return Record(
        **case.shape._asdict(),
        device="cpu",
        side=name,
        passed=errors[side.name] <= 1.0,
        error=errors[side.name],
        median_us=None if times is None else times.median_us,
        p10_us=None if times is None else times.p10_us,
        p90_us=None if times is None else times.p90_us,
        repeats=0 if times is None else times.repeats,
        baseline=case.sides[0].name,
        over_baseline=None,
        over_peft=None,
    )
