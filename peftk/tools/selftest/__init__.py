"""`peftk selftest`: checks that this build computes the right results on this machine.

Three sections. `parity`: every backend that runs here against the reference in fp64, within the documented bounds. On a
GPU, or in Triton's interpreter, also `behaviour` (the same bits in every run, CUDA graphs, streams, launches) and
`speed`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from peftk.backends import registry
from peftk.system.timing import cuda_events
from peftk.tools.benchmark.common import Record
from peftk.tools.selftest import behaviour, parity, report, speed
from peftk.tools.selftest.check import Check, Outcome, Target, gpu_lost, perform

SECTIONS = ("parity", "behaviour", "speed")


def target(name: str) -> Target:
    """The target cpu, cuda or interpreter, with all backends that run on it."""
    if name == "interpreter":
        return Target(name, "cpu", ("triton",))
    ops = ("lora_linear", "merge")
    runnable = tuple(b for b in registry.NAMES if any(parity.cannot_run(b, op, name) is None for op in ops))
    return Target(name, name, runnable)


def run(tested: Target, console: Console, *, sections: Sequence[str] = SECTIONS, out: Path | None = None) -> bool:
    """Runs the checks and prints a report; with `out`, also writes it into that folder. True if every check passed.

    console: must record if there is `out`.
    """
    started = time.monotonic()
    env = report.describe(tested)
    report.print_header(console, env)
    outcomes: list[Outcome] = []
    measured: dict[str, list[list[Record]]] = {}
    lost: str | None = None
    for section in sections:
        section_outcomes: list[Outcome] = []
        with console.status("") as status:
            for check in _checks(section, tested, measured):
                status.update(f"[dim]{check}", spinner="dots")
                outcome = perform(check) if lost is None else Outcome(*check[:4], not_run=lost)
                if outcome.failed and lost is None and tested.device == "cuda":
                    lost = gpu_lost(check)
                section_outcomes.append(outcome)
        report.print_section(console, section, section_outcomes)
        outcomes += section_outcomes
    report.print_speed(console, measured)
    absent = _absent_backends(tested)
    report.print_summary(console, outcomes, absent, time.monotonic() - started)
    if out is not None:
        report.write(console, out, env, outcomes, absent, measured)
    return not any(outcome.failed for outcome in outcomes)


def _checks(section: str, tested: Target, measured: dict[str, list[list[Record]]]) -> Iterator[Check]:
    if section == "parity":
        yield from parity.checks(tested)
    elif tested.name != "cpu" and {"triton", "cuda"} & set(tested.backends):
        if section == "behaviour":
            yield from behaviour.checks(tested, behaviour.tools(tested))
        else:
            yield from speed.checks(tested, cuda_events() if tested.device == "cuda" else None, measured)


def _absent_backends(tested: Target) -> list[str]:
    """A line for each backend that does not run here, with the reasons."""
    lines = []
    for backend in registry.NAMES:
        if backend not in tested.backends and not tested.is_rehearsal:
            reasons = {op: parity.cannot_run(backend, op, tested.device) for op in ("lora_linear", "merge")}
            lines.append(f"{backend} does not run here: {'; '.join(f'{op}: {why}' for op, why in reasons.items())}")
    return lines
