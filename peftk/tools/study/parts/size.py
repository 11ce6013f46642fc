"""Part 3: score against the number of trained parameters, in the form of figure 4 of Houlsby et al. 2019."""

from __future__ import annotations

from typing import Any

import peftk
from peftk.tools.study import figures
from peftk.tools.study.document import Section, Table
from peftk.tools.study.lab import Lab
from peftk.tools.study.methods import FULL, HEAD, Method, compared
from peftk.tools.study.part import Part, average, joined
from peftk.tools.study.parts import ranks
from peftk.tools.study.statistics import NONE_FOUND, paired, spread
from peftk.tools.study.training import injected
from peftk.tools.study.tuning import rates

NAME, TITLE = "size", "Score against size"
BOTTLENECKS = (2, 4, 8, 16, 32, 64)


def methods(layers: int) -> list[Method]:
    return [
        FULL,
        HEAD,
        *(Method("series", R) for R in BOTTLENECKS),
        *(Method("lora", r, "qv") for r in ranks.RANKS),
        *(Method("top", k) for k in range(1, layers + 1)),
    ]


def measure(lab: Lab) -> dict[str, Any]:
    """Rows that part 1 has too come with its seeds."""
    task, s = lab.settings.tasks[0], lab.settings
    wanted, before = methods(lab.layers), compared(lab.layers)
    chosen = rates(lab, task, wanted)
    runs = {
        m: [lab.run(task, m, chosen[m]["rate"], seed) for seed in (s.all_seeds if m in before else s.fewer_seeds)]
        for m in wanted
    }
    lab.results([run for each in runs.values() for run in each], f"{task}, size")
    return {
        "task": task,
        "rows": [
            {
                "label": m.label,
                "family": m.family,
                "trained": peftk.count_parameters(injected(lab.minilm.copy(), 2, each[0])).trainable,
                "scores": [found["score"] for found in lab.results(each)],
            }
            for m, each in runs.items()
        ],
    }


def section(part: Part) -> Section:
    task, rows = part.result["task"], part.result["rows"]
    title, metric = part.task_title(task), part.metric(task)
    full = rows[0]
    others = rows[1:]
    differences = {row["label"]: paired(row["scores"], full["scores"][: len(row["scores"])]) for row in others}
    equal = [row for row in others if differences[row["label"]].low is not None and not differences[row["label"]].found]
    if equal:
        least = min(equal, key=lambda row: row["trained"])
        message = (
            f"{title}: {NONE_FOUND} between {least['label']} ({least['trained']:,} parameters) and full fine-tuning"
        )
    else:
        best = max(rows, key=lambda row: average(row["scores"]))
        message = f"{title}: {best['label']} scores highest, with {best['trained']:,} trained parameters"
    figure, (axis,) = figures.new(part.message(message))
    families = dict.fromkeys(row["family"] for row in rows)
    lines = []
    for family in families:
        own = sorted((row for row in rows if row["family"] == family), key=lambda row: row["trained"])
        looks = figures.LOOKS[family]
        lines.append(figures.Curve(family, [r["trained"] for r in own], [r["scores"] for r in own], looks))
    figures.curves(axis, lines)
    figures.log_axis(axis, [10**n for n in range(3, 8)], base=10)
    axis.set(xlabel="trained parameters |Φ|, the head included (log axis)", ylabel=f"{metric} (no unit)")
    figures.legend_below(figure, axis, columns=5)
    single = [row["label"] for row in others if differences[row["label"]].low is None]
    claims = [differences[row["label"]].words(row["label"], full["label"]) for row in others if len(row["scores"]) > 1]
    if single:
        claims.append(f"With one seed, and so without an interval: {joined(single)}.")
    return part.section(
        TITLE,
        text=["The form of figure 4 of Houlsby et al. 2019: how many parameters must be trained?"],
        claims=claims,
        tables=[
            Table(
                f"{title}: {metric} by size",
                ("method", "trained |Φ|", metric, "seeds"),
                [(r["label"], f"{r['trained']:,}", spread(r["scores"]), str(len(r["scores"]))) for r in rows],
            )
        ],
        figures={"size": figure},
        caption="Lines: means over seeds; bars: the range over seeds.",
    )
