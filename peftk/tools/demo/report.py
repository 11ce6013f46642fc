"""The end of the demo: a summary table, demo.json and demo.png."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from peftk.tools.demo.stage import Stage, table

PLAIN, PEFT, PEFTK, QUIET = "#8a8f98", "#d98e32", "#1f6feb", "#b9c3d0"


def summary(stage: Stage) -> None:
    stage.console.print()
    stage.console.rule("[bold]Summary", align="left", style="dim")
    latency, mixed = stage.figures["latency"]["rows"], stage.figures["mixed_batch"]["throughput"]
    training, merge = stage.figures["training"], stage.figures["merge"]
    summary_table = table("", "fp32", "bf16")
    rows_by_dtype = {dtype: [row for row in latency if row["dtype"] == dtype] for dtype in ("fp32", "bf16")}
    others = {"plain": "the plain model", **({"peft": "HF PEFT"} if stage.has_peft else {})}
    for side, text in others.items():
        ratios = [
            median(row[f"{side}_ms"] / row["peftk_ms"] for row in rows_by_dtype[dtype]) for dtype in rows_by_dtype
        ]
        summary_table.add_row(f"one adapter, median over ranks: × {text}", *(f"{ratio:.2f}" for ratio in ratios))
    for side, text in {**others, "separate": "one adapter after another"}.items():
        summary_table.add_row(
            f"{len(stage.figures['mixed_batch']['ranks'])} adapters, one batch: × {text}",
            *(f"{row['mixed'] / row[side]:.2f}" for row in mixed),
        )
    summary_table.add_section()
    summary_table.add_row(
        "bits that differ after merge and unmerge", *(f"{merge[d]['bits_changed']:.0f}" for d in rows_by_dtype)
    )
    summary_table.add_row(
        "held-out sentences grouped correctly",
        f"{training['accuracy_before']:.0%} → {training['accuracy_after']:.0%}",
        "",
    )
    stage.console.print(summary_table)
    stage.say("[dim]× X: how many times faster peftk is than X, including its adapters.[/]")
    failed = [check["name"] for check in stage.checks if not check["passed"]]
    if failed:
        stage.say(f"[bold red]{len(failed)} of {len(stage.checks)} checks failed:[/] {'; '.join(failed)}")
    else:
        stage.say(f"[green]All {len(stage.checks)} checks passed.[/]")


def write(stage: Stage, out: Path, report: dict[str, Any]) -> list[Path]:
    """Writes demo.png and demo.json into `out` and returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _plot(stage, out / "demo.png", report)
    return [out / "demo.png", out / "demo.json"]


def _plot(stage: Stage, file: Path, report: dict[str, Any]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 4.1), layout="constrained")
        axes = figure.subplots(1, 4, width_ratios=[1, 1, 1.15, 0.9])
        for axis, dtype in zip(axes[:2], ("fp32", "bf16"), strict=True):
            _latency(axis, [row for row in stage.figures["latency"]["rows"] if row["dtype"] == dtype], dtype, stage)
        _mixed(axes[2], stage.figures["mixed_batch"], stage)
        _losses(axes[3], stage.figures["training"])
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False)
        environment = report["environment"]
        figure.suptitle(
            f"peftk {environment['peftk']} on all-MiniLM-L6-v2, every linear layer adapted · {environment['cpu']}, "
            f"{environment['threads']} threads · torch {environment['torch']}",
            fontsize=10,
        )
        figure.savefig(file, dpi=150)


def _latency(axis: Any, rows: list[dict[str, Any]], dtype: str, stage: Stage) -> None:
    ranks = [row["rank"] for row in rows]
    sides = [("plain", "plain model, no adapter", PLAIN), ("peftk", "peftk", PEFTK)]
    sides[1:1] = [("peft", "HF PEFT", PEFT)] if stage.has_peft else []
    for side, label, colour in sides:
        axis.plot(ranks, [row[f"{side}_ms"] for row in rows], marker="o", markersize=4, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(r) for r in ranks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set(title=f"latency per rank, {dtype}", xlabel="rank", ylabel="ms per batch")


def _mixed(axis: Any, figures: dict[str, Any], stage: Stage) -> None:
    sides = [("plain", "plain model,\nno adapter", PLAIN), ("separate", "peftk,\none by one", QUIET)]
    sides += [("peft", "HF PEFT,\nmixed", PEFT)] if stage.has_peft else []
    sides += [("mixed", "peftk,\nmixed", PEFTK)]
    rows = figures["throughput"]
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        x_positions = [x + (number - (len(rows) - 1) / 2) * width for x in range(len(sides))]
        bars = axis.bar(
            x_positions,
            [row[side] for side, _, _ in sides],
            width * 0.92,
            color=[colour for _, _, colour in sides],
            alpha=1.0 if number else 0.55,
        )
        axis.bar_label(bars, labels=[row["dtype"]] * len(sides), fontsize=7, color="#555555", padding=1)
    axis.set_xticks(range(len(sides)), [label for _, label, _ in sides], fontsize=8)
    axis.set(title=f"{len(figures['ranks'])} LoRAs and the base in one batch", ylabel="sentences / s")


def _losses(axis: Any, training: dict[str, Any]) -> None:
    axis.plot(range(1, training["steps"] + 1), training["losses"], color=PEFTK)
    axis.set_ylim(bottom=0)
    axis.set(title="training one LoRA", xlabel="step", ylabel="loss")
    axis.text(
        0.97,
        0.93,
        f"held-out accuracy\n{training['accuracy_before']:.0%} → {training['accuracy_after']:.0%}",
        transform=axis.transAxes,
        ha="right",
        va="top",
    )
