"""Part 2: LoRA by rank and placement, in the form of table 6 of Hu et al. 2021; and many runs in one batch."""

from __future__ import annotations

from typing import Any

from peftk.tools.study import costs, figures
from peftk.tools.study.document import Section, Table
from peftk.tools.study.lab import Lab
from peftk.tools.study.methods import PLACE_NAMES, Method
from peftk.tools.study.part import Part, average
from peftk.tools.study.statistics import paired, spread
from peftk.tools.study.tuning import rates

NAME, TITLE = "ranks", "LoRA by rank and placement"
RANKS = (1, 2, 4, 8, 64)
TIMED = Method("lora", 8, "qv")
TIMED_TOGETHER, ROWS_EACH = 8, (1, 4, 16)


def methods() -> list[Method]:
    return [Method("lora", r, where) for where in PLACE_NAMES for r in RANKS]


def measure(lab: Lab) -> dict[str, Any]:
    task, seeds = lab.settings.tasks[0], lab.settings.fewer_seeds
    chosen = rates(lab, task, methods())
    runs = {m: [lab.run(task, m, chosen[m]["rate"], seed) for seed in seeds] for m in methods()}
    lab.results([run for each in runs.values() for run in each], f"{task}, ranks")
    rows = [
        {"r": m.size, "where": m.where, "scores": [found["score"] for found in lab.results(each)]}
        for m, each in runs.items()
    ]
    with lab.stage.busy("one mixed batch, and one run after another"):
        timed = [costs.of_together(lab, task, TIMED, TIMED_TOGETHER, each) for each in ROWS_EACH]
    return {"task": task, "rows": rows, "together": timed}


def section(part: Part) -> Section:
    task, rows = part.result["task"], part.result["rows"]
    title, metric = part.task_title(task), part.metric(task)
    scores = {(row["where"], row["r"]): row["scores"] for row in rows}
    low, high = RANKS[0], RANKS[-1]
    differences = {where: paired(scores[where, high], scores[where, low]) for where in PLACE_NAMES}
    found = [PLACE_NAMES[where] for where in PLACE_NAMES if differences[where].found]
    best = max(rows, key=lambda row: average(row["scores"]))
    message = f"{title}: r = {high} differs from r = {low} at {len(found)} of {len(PLACE_NAMES)} placements"
    if differences["q"].low is None:
        message = f"{title}: the best of {len(rows)} is r = {best['r']} at {PLACE_NAMES[best['where']]} (one seed)"
    figure, (axis,) = figures.new(part.message(message))
    figures.curves(
        axis,
        [
            figures.Curve(name, RANKS, [scores[where, r] for r in RANKS], look)
            for (where, name), look in zip(PLACE_NAMES.items(), figures.ANY, strict=False)
        ],
    )
    figures.log_axis(axis, RANKS)
    axis.set(xlabel="rank r (log axis)", ylabel=f"{metric} (no unit)")
    figures.legend_below(figure, axis)
    table = Table(
        f"{title}: {metric}, by LoRA's rank",
        ("placement", *(f"r = {r}" for r in RANKS), f"r = {high} minus r = {low}"),
        [
            (name, *(spread(scores[where, r]) for r in RANKS), str(differences[where]))
            for where, name in PLACE_NAMES.items()
        ],
    )
    return part.section(
        TITLE,
        text=["The form of table 6 of Hu et al. 2021: is a small rank enough, and where should it go?"],
        claims=[
            differences[where].words(f"LoRA with r = {high} at {name}", f"r = {low} there")
            for where, name in PLACE_NAMES.items()
        ],
        tables=[table, _together(part)],
        figures={"ranks": figure},
        caption=_caption(part),
    )


def _together(part: Part) -> Table:
    rows = []
    for row in part.result["together"]:
        mixed, separate = row["mixed_ms"], row["separate_ms"]
        each = mixed / row["adapters"]
        cells = (
            f"{mixed:.0f}",
            f"{separate:.0f}",
            f"{each:.0f}",
            f"{separate / mixed:.2f}",
            f"{row['difference']:.0e}",
        )
        rows.append((f"{row['adapters']} adapters, {row['rows']} rows each", *cells))
    return Table(
        f"A step of many runs ({TIMED.label}, other seeds), as adapters of one mixed batch and one after another",
        (
            "runs",
            "one batch, ms",
            "one after another, ms",
            "one batch, ms an adapter",
            "× faster",
            "largest difference of losses",
        ),
        rows,
    )


def _caption(part: Part) -> str:
    worst = max((row["not_run"] for row in part.result["together"] if row["not_run"] is not None), default=None)
    return f"Times: {part.environment['cpu']}, {part.environment['threads']} threads, fp32. {part.quietness(worst)}"
