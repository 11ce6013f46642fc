"""The output of `peftk bench`: tables, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from peftk.tools.benchmark.common import COPY, LINEAR, PEFT, Record, to_json

_COLOURS = {LINEAR: "#8a8f98", COPY: "#8a8f98", PEFT: "#d98e32"}
_PEFTK_COLOURS = ("#1f6feb", "#2ea043", "#8957e5", "#cf222e")
_SHORT = {LINEAR: "Linear", COPY: "copy", PEFT: "PEFT"}
NOTES = {
    "lora_linear": "forward of a layer with one adapter",
    "multi_lora_linear": "adapters of mixed ranks in one batch; HF PEFT's adapter_names",
    "train": "forward and backward; nn.Linear: W frozen, gradient of x only",
    "merge": "W ← W + s·BA; peftk's includes the receipt for an exact unmerge",
    "unmerge": "W' back to W; peftk's restores every bit",
}


def table(rows: list[list[Record]]) -> Table:
    """A table of rows of one op, dtype and layer size, which have the same sides."""
    first = rows[0][0]
    op_table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{first.op} {first.dtype}  {first.K} → {first.N}, µs",
        title_style="bold",
        title_justify="left",
        pad_edge=False,
    )
    fields = _fields(first)
    for header in fields:
        op_table.add_column(header, justify="right", no_wrap=True)
    sides = [record.side for record in rows[0]]
    for side in sides:
        op_table.add_column(side, justify="right", no_wrap=True)
        for other in _ratio_columns(side, sides):
            op_table.add_column(
                f"×\n{_SHORT[other]}", justify="right", no_wrap=True, style="dim" if side == PEFT else None
            )
    for row in rows:
        cells = [str(getattr(row[0], field)) for field in fields.values()]
        for record in row:
            cells += _cells(record, _ratio_columns(record.side, sides))
        op_table.add_row(*cells)
    return op_table


def _fields(record: Record) -> dict[str, str]:
    """The columns that tell the rows of a table apart: header and field of Record."""
    if record.baseline == COPY:
        return {"rank": "rank"}
    return {"tokens": "M"} | ({"adapters": "adapters"} if record.op == "multi_lora_linear" else {"rank": "rank"})


def _ratio_columns(side: str, sides: list[str]) -> list[str]:
    """The other sides that a side is compared with: the first, and HF PEFT."""
    others = [] if side == sides[0] else [sides[0]]
    return [*others, PEFT] if PEFT in sides and side not in (sides[0], PEFT) else others


def _cells(record: Record, ratio_columns: list[str]) -> list[str]:
    if record.median_us is None:
        return [f"[bold red]FAIL[/] {record.error:.1f}×", *[""] * len(ratio_columns)]
    ours = record.side.startswith("peftk")
    ratios = [record.over_peft if other == PEFT else record.over_baseline for other in ratio_columns]
    return [
        f"[bold]{_us(record.median_us)}[/]" if ours else _us(record.median_us),
        *(
            "" if ratio is None else f"[green]{ratio:.2f}[/]" if ours and ratio >= 1 else f"{ratio:.2f}"
            for ratio in ratios
        ),
    ]


def _us(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def write_json(
    file: Path, records: Sequence[Any], environment: dict[str, Any], options: dict[str, Any], **more: Any
) -> None:
    report = {"environment": environment, "options": options, **more, "records": to_json(records)}
    file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(file: Path, record_type: type[Any], records: Sequence[Any]) -> None:
    """record_type: the dataclass of the records; its fields are the columns."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in dataclasses.fields(record_type)])
        writer.writeheader()
        writer.writerows(to_json(records))


def write_plot(file: Path, records: Sequence[Any], environment: dict[str, Any]) -> None:
    """One panel per op, dtype, layer size and number of tokens: µs against rank, or against number of adapters."""
    import matplotlib
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str, int, int, int], list[Record]] = {}
    for record in records:
        panels.setdefault((record.op, record.dtype, record.M, record.K, record.N), []).append(record)
    columns_across = min(len(panels), 4)
    rows_down = -(-len(panels) // columns_across)
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(max(3.3 * columns_across, 6.6), 2.7 * rows_down + 0.6), layout="constrained")
        axes = list(figure.subplots(rows_down, columns_across, squeeze=False).flat)
        for axis, ((op, dtype, M, K, N), members) in zip(axes, panels.items(), strict=False):
            _panel(axis, members, "adapters" if op == "multi_lora_linear" else "rank")
            axis.set_title(f"{op} {dtype}\n{K}→{N}" + (f", M = {M}" if M else ""))
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        drawn: dict[str, Any] = {}
        for axis in axes[: len(panels)]:
            handles, labels = axis.get_legend_handles_labels()
            drawn |= dict(zip(labels, handles, strict=True))
        if drawn:
            figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=len(drawn), frameon=False)
        machine = f"{environment['gpu'] or environment['cpu']}, {environment['threads']} threads"
        figure.suptitle(
            f"peftk {environment['peftk']} · {machine} · torch {environment['torch']} · nn.Linear has no adapter",
            fontsize=9,
        )
        figure.savefig(file, dpi=150)


def _panel(axis: Any, records: list[Record], field: str) -> None:
    sides = list(dict.fromkeys(record.side for record in records))
    colours = {**_COLOURS, **dict(zip((s for s in sides if s not in _COLOURS), _PEFTK_COLOURS, strict=False))}
    x_values = sorted({getattr(record, field) for record in records})
    if len(x_values) == 1:
        heights = [0.0 if r.median_us is None else r.median_us for r in records]
        bars = axis.bar(sides, heights, 0.6, color=[colours[side] for side in sides])
        axis.bar_label(bars, labels=[_us(height) for height in heights])
        axis.set(ylabel="µs", xlabel=f"{field} {x_values[0]}")
        axis.tick_params(axis="x", labelsize=7)
        return
    for side in sides:
        points = [r for r in records if r.side == side and r.median_us is not None]
        axis.plot(
            [x_values.index(getattr(r, field)) for r in points],
            [r.median_us for r in points],
            marker="o",
            markersize=3.5,
            color=colours[side],
            label=side,
        )
    axis.set_xticks(range(len(x_values)), [str(place) for place in x_values])
    axis.set_ylim(bottom=0)
    axis.set(xlabel=field, ylabel="µs")
