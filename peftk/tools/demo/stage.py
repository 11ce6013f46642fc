"""Shared by the steps of the demo: the console, the figures for demo.json, and the checks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

STEPS = 7


@dataclasses.dataclass
class Stage:
    console: Console
    quick: bool
    has_peft: bool
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    checks: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def step(self, number: int, title: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{number}/{STEPS}  {title}", align="left", style="dim")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Shows a spinner, if the terminal can."""
        with self.console.status(f"[dim]{text}"):
            yield

    def check(self, name: str, value: float, bound: float) -> None:
        """Records and prints whether value ≤ bound."""
        passed = bool(value <= bound)
        self.checks.append({"name": name, "value": float(value), "bound": float(bound), "passed": passed})
        mark = "[green]✓[/]" if passed else "[bold red]✗[/]"
        self.say(f"{mark} {name}: {value:.2g} [dim](allowed {bound:.2g})[/]")

    @property
    def passed(self) -> bool:
        return all(check["passed"] for check in self.checks)


def table(*columns: str, title: str | None = None) -> Table:
    """A table in the style of the demo: the first column left-aligned, the others right-aligned."""
    styled_table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        styled_table.add_column(column, justify="left" if number == 0 else "right")
    return styled_table


def sparkline(values: list[float]) -> str:
    low, high = min(values), max(values)
    steps = "▁▂▃▄▅▆▇█"
    return "".join(steps[round((value - low) / ((high - low) or 1.0) * (len(steps) - 1))] for value in values)


def speedup(theirs: float, ours: float) -> str:
    """How many times faster `ours` is than `theirs`, in green if it is faster."""
    ratio = theirs / ours
    return f"[green]{ratio:.2f}[/]" if ratio > 1 else f"{ratio:.2f}"
