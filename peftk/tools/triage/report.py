"""What the triage prints: a line for each group, the figures of the timing groups, a summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftk.tools.triage import records
from peftk.tools.triage.records import Verdict

_COLORS = {"passed": "green", "failed": "red", "crashed": "bold red", "timed out": "bold red"}


def print_header(console: Console, device: str, folder: Path) -> None:
    console.print(f"[bold]peftk selftest --triage[/] {device}: results in {escape(str(folder))}", highlight=False)
    if device == "interpreter":
        console.print("[yellow]A rehearsal on tiny tensors: its times say nothing about a GPU.[/]", highlight=False)


def print_verdict(console: Console, verdict: Verdict, *, kept: bool) -> None:
    line = f"[{_COLORS[verdict.state]}]{escape(str(verdict))}[/]"
    console.print(f"{line} [dim](from an earlier run)[/]" if kept else line, highlight=False)


def print_figures(console: Console, folder: Path, verdicts: Sequence[Verdict]) -> None:
    """A table of medians in µs for each group that measured."""
    for verdict in verdicts:
        found = records.read(folder / f"{verdict.group}.jsonl")
        rows = [r["figures"] for r in found if "us" in r.get("figures", {})]
        if not rows:
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{verdict.group}: medians in µs")
        sides = dict.fromkeys(side for row in rows for side in row["us"])
        for column in ("", *sides):
            table.add_column(column, justify="right")
        for row in rows:
            medians = [row["us"].get(side, {}).get("median") for side in sides]
            table.add_row(str(row["row"]), *("" if us is None else f"{us:.1f}" for us in medians))
        console.print(table)


def print_summary(console: Console, verdicts: Sequence[Verdict], folder: Path) -> None:
    bad = [verdict for verdict in verdicts if verdict.state != "passed"]
    seconds = sum(verdict.seconds for verdict in verdicts)
    for verdict in bad:
        where = escape(str(folder / f"{verdict.group}.log"))
        console.print(f"{verdict.group}: {verdict.state}; what it printed is in {where}", highlight=False)
    words = f"{len(bad)} of {len(verdicts)} groups did not pass" if bad else "All passed"
    console.print(f"{f'[bold red]{words}[/]' if bad else f'[green]{words}[/]'}, {seconds:.0f} s.", highlight=False)
