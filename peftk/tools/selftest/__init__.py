"""`peftk selftest`: does what was built compute what it should on this machine?

Three sections: `parity`, every backend that runs against the reference in fp64 within the documented bounds; on a GPU,
or rehearsed in Triton's interpreter, also `behaviour`, what the kernels promise beside results (the same bits, CUDA
graphs, streams, launches), and `speed`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from peftk.backends import registry
from peftk.system.timing import cuda_events
from peftk.tools.benchmark.common import Record
from peftk.tools.selftest import behaviour, parity, report, speed
from peftk.tools.selftest.check import Check, Outcome, Target, perform

SECTIONS = ("parity", "behaviour", "speed")


def target(name: str) -> Target:
    """cpu, cuda or interpreter, with all backends that run there."""
    if name == "interpreter":
        return Target(name, "cpu", ("triton",))
    ops = ("lora_linear", "merge")
    able = tuple(b for b in registry.NAMES if any(parity.cannot_run(b, op, name) is None for op in ops))
    return Target(name, name, able)


def run(where: Target, console: Console, *, sections: Sequence[str] = SECTIONS, out: Path | None = None) -> bool:
    """Prints one report and, with `out`, writes it into that folder too; True where everything passed.

    console: for `out` one that records.
    """
    started = time.monotonic()
    described = report.describe(where)
    report.head(console, described)
    outcomes: list[Outcome] = []
    measured: dict[str, list[list[Record]]] = {}
    lost: str | None = None
    for section in sections:
        done: list[Outcome] = []
        with console.status("") as status:
            for check in _checks(section, where, measured):
                status.update(f"[dim]{check}", spinner="dots")
                outcome = perform(check) if lost is None else Outcome(*check[:4], not_run=lost)
                if outcome.failed and lost is None and where.device == "cuda":
                    lost = _lost(check)
                done.append(outcome)
        report.section(console, section, done)
        outcomes += done
    report.speed(console, measured)
    absent = _absent(where)
    report.foot(console, outcomes, absent, time.monotonic() - started)
    if out is not None:
        report.write(console, out, described, outcomes, absent, measured)
    return not any(outcome.failed for outcome in outcomes)


def _checks(section: str, where: Target, measured: dict[str, list[list[Record]]]) -> Iterator[Check]:
    if section == "parity":
        yield from parity.checks(where)
    elif where.name != "cpu" and {"triton", "cuda"} & set(where.backends):
        if section == "behaviour":
            yield from behaviour.checks(where, behaviour.tools(where))
        else:
            yield from speed.checks(where, cuda_events() if where.device == "cuda" else None, measured)


def _lost(check: Check) -> str | None:
    """Why nothing more can run: after some errors a process can't use its GPU any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"the GPU is lost to this process since {check}: {str(error).splitlines()[0]}"
    return None


def _absent(where: Target) -> list[str]:
    """A line for every backend that doesn't run here."""
    lines = []
    for backend in registry.NAMES:
        if backend not in where.backends and not where.rehearses:
            reasons = {op: parity.cannot_run(backend, op, where.device) for op in ("lora_linear", "merge")}
            lines.append(f"{backend} does not run here: {'; '.join(f'{op}: {why}' for op, why in reasons.items())}")
    return lines
