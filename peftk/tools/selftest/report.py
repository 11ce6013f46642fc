"""What `peftk selftest` shows and writes."""

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
    "speed": "Speed: medians, sides taking turns; ×: how many times faster",
}
_AT_MOST = 20  # failures shown; the JSON file has all


def describe(target: Target) -> dict[str, Any]:
    """What the report was made on."""
    where = environment(target.device)
    if target.device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        where |= {
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_processors": properties.multi_processor_count,
            "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
            "driver": _driver(),
        }
    return {"target": target.name, **where}


def _driver() -> str | None:
    """The version, where nvidia-smi is there to say it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return said.stdout.strip().splitlines()[0] if said.returncode == 0 and said.stdout.strip() else None


def head(console: Console, where: dict[str, Any]) -> None:
    console.print(f"[bold]peftk selftest[/] {where['target']}: {where['gpu'] or where['cpu']}", highlight=False)
    fields = ("peftk", "torch", "triton", "peft", "python", "cuda", "driver", "capability")
    fields += ("gpu_processors", "gpu_memory_gib", "platform")  # type: ignore[assignment]
    said = (f"{field} {where[field]}" for field in fields if where.get(field) is not None)
    console.print(f"[dim]{' · '.join(said)}[/]", highlight=False)
    if where["target"] == "interpreter":
        console.print(
            "[yellow]A rehearsal of --device cuda: tiny CPU tensors through Triton's interpreter. Its times say "
            "nothing about any GPU.[/]",
            highlight=False,
        )


def section(console: Console, name: str, outcomes: Sequence[Outcome]) -> None:
    """A line for every backend and operation."""
    if not outcomes:
        return
    console.print(f"\n[bold]{TITLES[name]}[/]", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = {"backend": "left", "operation": "left", "cases": "right", "worst error / allowed": "right", "": "left"}
    if name != "parity":
        del columns["worst error / allowed"]
    for column, side in columns.items():
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for (backend, op), members in _grouped(outcomes).items():
        ran = [o for o in members if o.not_run is None]
        worst = [f"{max((o.error for o in ran), default=0.0):.2f}"] if name == "parity" else []
        table.add_row(backend, op, str(len(ran) or len(members)), *worst, _mark(members))
    console.print(table)


def _grouped(outcomes: Iterable[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    found: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.backend, outcome.op), []).append(outcome)
    return found


def _mark(outcomes: Sequence[Outcome]) -> str:
    if any(o.failed for o in outcomes):
        return "[bold red]FAIL[/]"
    left_out = [o for o in outcomes if o.not_run is not None]
    if not left_out:
        return "[green]pass[/]"
    return "[yellow]not run[/]" if len(left_out) == len(outcomes) else f"[green]pass[/], {len(left_out)} not run"


def speed(console: Console, found: dict[str, list[list[Record]]]) -> None:
    for title, rows in found.items():
        table = report.table(rows)
        table.title = title
        console.print(table)


def foot(console: Console, outcomes: Sequence[Outcome], absent: Sequence[str], seconds: float) -> None:
    """What was not run, and why; what is wrong."""
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
    where: dict[str, Any],
    outcomes: Sequence[Outcome],
    absent: Sequence[str],
    found: dict[str, list[list[Record]]],
) -> None:
    """report.json and report.txt, what was shown; console: one that records."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "environment": where,
        "passed": not any(o.failed for o in outcomes),
        "absent": list(absent),
        "outcomes": [dataclasses.asdict(o) for o in outcomes],
        "speed": [{"table": title, **r} for title, rows in found.items() for row in rows for r in to_json(row)],
    }
    json_file, text_file = folder / "report.json", folder / "report.txt"
    json_file.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text_file.write_text(console.export_text(clear=False), encoding="utf-8")
    console.print(f"Written: {json_file}, {text_file}", highlight=False)
