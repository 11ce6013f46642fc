"""Part 1: what each method trains, scores and costs, in the form of table 4 of Hu et al. 2021."""

from __future__ import annotations

from typing import Any

import peftk
from peftk.tools.study import costs, figures, gpt3
from peftk.tools.study.document import Section, Table
from peftk.tools.study.lab import Lab
from peftk.tools.study.methods import FULL, Method, compared
from peftk.tools.study.part import Part, average
from peftk.tools.study.runs import Run
from peftk.tools.study.statistics import NONE_FOUND, paired, spread
from peftk.tools.study.training import injected
from peftk.tools.study.tuning import rates

NAME, TITLE = "methods", "Methods"


def measure(lab: Lab) -> dict[str, Any]:
    methods = compared(lab.layers)
    found = {task: _of_task(lab, task, methods) for task in lab.settings.tasks}
    with lab.stage.busy("times and memory"):
        cost = costs.of_methods(lab, lab.settings.tasks[0], methods)
    counts = [_count(lab, method) for method in methods]
    return {
        "methods": [{"label": m.label, "family": m.family, **c} for m, c in zip(methods, counts, strict=True)],
        "tasks": found,
        "costs": cost,
        "gpt3": [row._asdict() for row in gpt3.rows()],
    }


def _of_task(lab: Lab, task: str, methods: list[Method]) -> dict[str, Any]:
    chosen = rates(lab, task, methods)
    seeds = lab.settings.all_seeds
    runs = [lab.run(task, method, chosen[method]["rate"], seed) for method in methods for seed in seeds]
    records = lab.results(runs, f"{task}, methods")
    scores = [record["score"] for record in records]
    return {
        method.label: {"scores": scores[n * len(seeds) : (n + 1) * len(seeds)], **chosen[method]}
        for n, method in enumerate(methods)
    }


def _count(lab: Lab, method: Method) -> dict[str, int]:
    run = Run("", method, 0, 0, 0, 0, 0, 0, 0, 0)
    count = peftk.count_parameters(injected(lab.minilm.copy(), 2, run))
    return {"trained": count.trainable, "all": count.total}


def section(part: Part) -> Section:
    result = part.result
    methods = result["methods"]
    tables, claims, drawn = [], [], {}
    full = FULL.label
    for task, rows in result["tasks"].items():
        title, metric = part.task_title(task), part.metric(task)
        differences = {m["label"]: paired(rows[m["label"]]["scores"], rows[full]["scores"]) for m in methods}
        tables.append(
            Table(
                f"{title}: {metric}",
                ("method", "trained |Φ|", "|Φ|/|Θ|", "learning rate", metric, "minus full fine-tuning"),
                [
                    (
                        m["label"],
                        f"{m['trained']:,}",
                        f"{m['trained'] / m['all']:.3%}",
                        f"{rows[m['label']]['rate']:g}",
                        spread(rows[m["label"]]["scores"]),
                        "" if m["label"] == full else str(differences[m["label"]]),
                    )
                    for m in methods
                ],
            )
        )
        others = [m["label"] for m in methods if m["label"] != full]
        found = [label for label in others if differences[label].found]
        claims += [f"{title}: {differences[label].words(label, full)}" for label in found]
        equal = [f"{label}, {differences[label]}" for label in others if label not in found]
        if len(rows[full]["scores"]) < 2:
            message = f"{title}: one seed shows no difference"
        elif found:
            message = f"{title}: {len(found)} of {len(others)} methods differ from full fine-tuning"
        else:
            message = f"{title}: {NONE_FOUND} between full fine-tuning and any method"
        if equal and len(rows[full]["scores"]) > 1:
            claims.append(f"{title}: {NONE_FOUND} between full fine-tuning and each of: {'; '.join(equal)}.")
        drawn[f"methods_{task}"] = _figure(part.message(message), metric, methods, rows)
    claims += [_rates_claim(part, result)]
    tables += [_grids(result), _costs(result), _gpt3(result)]
    claims += gpt3.remainders()
    return part.section(
        TITLE,
        text=[
            "What a method trains, what it scores and what it costs, in the form of table 4 of Hu et al. 2021. Every "
            "method trains the head too; |Φ| counts it. The difference from full fine-tuning is paired over seeds: the "
            "same sentences in the same order, the same start of the head. Intervals are Student's, for each row by "
            "itself: of twenty true zeros one is expected outside."
        ],
        claims=claims,
        tables=tables,
        figures=drawn,
        caption=_cost_caption(part, result["costs"]),
    )


def _figure(message: str, metric: str, methods: list[dict[str, Any]], rows: dict[str, Any]) -> Any:
    figure, (axis,) = figures.new(message, size=(7.2, 0.26 * len(methods) + 1.2))
    places = range(len(methods), 0, -1)
    for place, method in zip(places, methods, strict=True):
        scores = rows[method["label"]]["scores"]
        colour, marker = figures.LOOKS[method["family"]]
        axis.hlines(place, min(scores), max(scores), color=colour, linewidth=3, alpha=0.35)
        axis.plot(scores, [place] * len(scores), marker="|", linestyle="", color=colour, markersize=7)
        axis.plot([average(scores)], [place], marker=marker, color=colour, markersize=5.5)
    axis.axvline(average(rows[FULL.label]["scores"]), color=figures.INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(list(places), [method["label"] for method in methods])
    axis.set_xlabel(f"{metric} (no unit), mean and seeds; dotted: full fine-tuning")
    return figure


def _grids(result: dict[str, Any]) -> Table:
    rows = []
    for task, found in result["tasks"].items():
        for grid in {row["of"]: row for row in found.values()}.values():
            tried = ", ".join(f"{each['rate']:g}: {each['held_out']:.3f}" for each in grid["grid"])
            rows.append((f"{task}: {grid['of']}", tried, f"{grid['rate']:g}", "yes" if grid["edge"] else ""))
    columns = ("chosen for", "rate: score on held-out training data", "chosen", "at the grid's edge")
    return Table("Learning rates, chosen with the first seed", columns, rows)


def _rates_claim(part: Part, result: dict[str, Any]) -> str:
    told = []
    for task, rows in result["tasks"].items():
        lora = next(row for label, row in rows.items() if label.startswith("LoRA"))
        ratio = lora["rate"] / rows[FULL.label]["rate"]
        told.append(f"{part.task_title(task)}: LoRA's chosen learning rate is {ratio:g} times that of full fine-tuning")
    return "; ".join(told) + ", on grids with half a decade between two rates (one seed, no interval)."


def _costs(result: dict[str, Any]) -> Table:
    cost = result["costs"]
    rows: list[tuple[str, ...]] = [("plain model", "", "", f"{cost['plain_ms']:.1f}", "")]
    for label, each in cost["methods"].items():
        merged = "" if each["merged_ms"] is None else f"{each['merged_ms']:.1f}"
        rows.append((label, f"{each['step_ms']:.0f}", f"{each['peak_mib']:.0f}", f"{each['forward_ms']:.1f}", merged))
    title = f"Cost on {cost['sentences']} sentences, {cost['tokens']} tokens with padding"
    columns = ("method", "training step, ms", "peak of a step, MiB", "forward, ms", "forward merged, ms")
    return Table(title, columns, rows)


def _cost_caption(part: Part, cost: dict[str, Any]) -> str:
    return (
        f"{part.environment['cpu']}, {part.environment['threads']} threads, fp32, sides in turns, medians; all layers "
        f"run. {part.quietness(cost['not_run'])} Peak: what torch allocates in a step beyond what it held before."
    )


def _gpt3(result: dict[str, Any]) -> Table:
    return Table(
        f"GPT-3 175B by closed forms (n = {gpt3.LAYERS}, d = {gpt3.WIDTH:,}), beside table 4 of Hu et al. 2021",
        ("method", "formula", "gives", "the table, M"),
        [(row["method"], row["formula"], f"{row['parameters']:,}", f"{row['printed']}") for row in result["gpt3"]],
    )
