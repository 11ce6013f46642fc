"""The output of `peftk selftest`: tables on the console, report.json and report.txt."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftk.tools.benchmark import report
from peftk.tools.benchmark.common import Record, to_json
from peftk.tools.benchmark.environment import environment
from peftk.tools.selftest.check import Outcome, Target

TITLES = {
    "parity": "Results against fp64, as multiples of the documented bound",
    "behaviour": "Behaviour",
    "speed": "Speed: medians of sides that take turns; ×: how many times faster",
}
_AT_MOST = 20  # failures printed; the JSON file has all of them


def describe(target: Target) -> dict[str, Any]:
    """The environment of the report, as JSON values."""
    env = environment(target.device)
    if target.device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        env |= {
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_processors": properties.multi_processor_count,
            "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
            "driver": _driver(),
        }
    return {"target": target.name, **env}


def _driver() -> str | None:
    """The driver's version, or None if nvidia-smi does not report it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return result.stdout.strip().splitlines()[0] if result.returncode == 0 and result.stdout.strip() else None


def print_header(console: Console, env: dict[str, Any]) -> None:
    console.print(f"[bold]peftk selftest[/] {env['target']}: {env['gpu'] or env['cpu']}", highlight=False)
    fields = ("peftk", "torch", "triton", "peft", "python", "cuda", "driver", "capability")
    fields += ("gpu_processors", "gpu_memory_gib", "platform")  # type: ignore[assignment]
    parts = (f"{field} {env[field]}" for field in fields if env.get(field) is not None)
    console.print(f"[dim]{' · '.join(parts)}[/]", highlight=False)
    if env["target"] == "interpreter":
        console.print(
            "[yellow]The checks of --device cuda, on tiny CPU tensors in Triton's interpreter. Their times say nothing "
            "about a GPU.[/]",
            highlight=False,
        )


def print_section(console: Console, name: str, outcomes: Sequence[Outcome]) -> None:
    """Prints a table with a line per backend and operation."""
    if not outcomes:
        return
    console.print(f"\n[bold]{TITLES[name]}[/]", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = {"backend": "left", "operation": "left", "cases": "right", "worst error / bound": "right", "": "left"}
    if name != "parity":
        del columns["worst error / bound"]
    for column, side in columns.items():
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for (backend, op), members in _group_by_operation(outcomes).items():
        ran = [o for o in members if o.not_run is None]
        worst = [f"{max((o.error for o in ran), default=0.0):.2f}"] if name == "parity" else []
        table.add_row(backend, op, str(len(ran) or len(members)), *worst, _mark(members))
    console.print(table)


def _group_by_operation(outcomes: Iterable[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    tables: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        tables.setdefault((outcome.backend, outcome.op), []).append(outcome)
    return tables


def _mark(outcomes: Sequence[Outcome]) -> str:
    if any(o.failed for o in outcomes):
        return "[bold red]FAIL[/]"
    skipped = [o for o in outcomes if o.not_run is not None]
    if not skipped:
        return "[green]pass[/]"
    return "[yellow]not run[/]" if len(skipped) == len(outcomes) else f"[green]pass[/], {len(skipped)} not run"


def print_speed(console: Console, tables: dict[str, list[list[Record]]]) -> None:
    for title, rows in tables.items():
        table = report.table(rows)
        table.title = title
        console.print(table)


def print_summary(console: Console, outcomes: Sequence[Outcome], absent: Sequence[str], seconds: float) -> None:
    """Prints what was not run and why, the failures, and the totals."""
    reasons: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.not_run is not None:
            reasons.setdefault(outcome.not_run, []).append(outcome)
    for line in absent:
        console.print(f"[dim]{escape(line)}[/]", highlight=False)
    for reason, members in reasons.items():
        what = ", ".join(dict.fromkeys(f"{o.backend} {o.op}" for o in members))
        console.print(f"[yellow]not run[/]: {escape(what)} ({len(members)} cases): {escape(reason)}", highlight=False)
    failures = [o for o in outcomes if o.failed]
    for failure in failures[:_AT_MOST]:
        console.print(f"[red]{escape(str(failure))}[/]", highlight=False)
    ran = sum(o.not_run is None for o in outcomes)
    console.print(f"{ran} cases in {seconds:.0f} s.", highlight=False)
    console.print(f"[bold red]{len(failures)} cases failed.[/]" if failures else "[green]All passed.[/]")


def write(
    console: Console,
    folder: Path,
    env: dict[str, Any],
    outcomes: Sequence[Outcome],
    absent: Sequence[str],
    tables: dict[str, list[list[Record]]],
) -> None:
    """Writes report.json, and report.txt with everything printed so far. console: must record."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "environment": env,
        "passed": not any(o.failed for o in outcomes),
        "absent": list(absent),
        "outcomes": [dataclasses.asdict(o) for o in outcomes],
        "speed": [{"table": title, **r} for title, rows in tables.items() for row in rows for r in to_json(row)],
    }
    json_file, text_file = folder / "report.json", folder / "report.txt"
    json_file.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text_file.write_text(console.export_text(clear=False), encoding="utf-8")
    console.print(f"Written: {json_file}, {text_file}", highlight=False)
