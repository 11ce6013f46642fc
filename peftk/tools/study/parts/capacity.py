"""Part 7: for how much training data is a small rank enough?"""

from __future__ import annotations

from typing import Any

from peftk.tools.study import figures
from peftk.tools.study.document import Section, Table
from peftk.tools.study.lab import Lab
from peftk.tools.study.methods import FULL, Method
from peftk.tools.study.part import Part
from peftk.tools.study.statistics import NONE_FOUND, paired, spread
from peftk.tools.study.tuning import rates

NAME, TITLE = "capacity", "Capacity"
SMALL = Method("lora", 1, "qv")
METHODS = (FULL, SMALL, Method("lora", 8, "qv"), Method("lora", 64, "qv"))


def measure(lab: Lab) -> dict[str, Any]:
    task, s = lab.settings.tasks[0], lab.settings
    chosen = rates(lab, task, METHODS)
    sizes = sorted({min(size, len(lab.data(task).train)) for size in s.sizes})
    runs = {
        (m, size): [lab.run(task, m, chosen[m]["rate"], seed, train=size) for seed in s.fewer_seeds]
        for m in METHODS
        for size in sizes
    }
    lab.results([run for each in runs.values() for run in each], f"{task}, capacity")
    rows = []
    for (method, size), each in runs.items():
        records = lab.results(each)
        fitted = [record["losses"][-1] for record in records]
        rows.append({"method": method.label, "size": size, "scores": [r["score"] for r in records], "losses": fitted})
    return {"task": task, "sizes": sizes, "rows": rows}


def section(part: Part) -> Section:
    task, sizes, rows = part.result["task"], part.result["sizes"], part.result["rows"]
    title, metric = part.task_title(task), part.metric(task)
    found = {(row["method"], row["size"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    full, small = FULL.label, SMALL.label
    differences = {n: paired(found[small, n]["scores"], found[full, n]["scores"]) for n in sizes}
    below = [n for n in sizes if differences[n].found and differences[n].mean < 0]
    if differences[sizes[0]].low is None:
        gap = differences[sizes[-1]]
        message = f"{title}: at {sizes[-1]:,} examples r = 1 is {gap.mean:+.3f} from full fine-tuning (one seed)"
    elif below:
        message = f"{title}: r = 1 stops being enough at {below[0]:,} training examples"
    else:
        message = f"{title}: {NONE_FOUND} between r = 1 and full fine-tuning at any of {len(sizes)} sizes"
    figure, axes = figures.new(part.message(message), columns=2, size=(8.4, 3.9))
    looks = (figures.LOOKS[full], *figures.ANY)
    for axis, key, label in zip(
        axes, ("scores", "losses"), (f"test: {metric} (no unit)", "training loss, last tenth (nats)"), strict=True
    ):
        figures.curves(
            axis,
            [
                figures.Curve(method.split(", query")[0], sizes, [found[method, n][key] for n in sizes], look)
                for method, look in zip(methods, looks, strict=False)
            ],
        )
        figures.log_axis(axis, sizes, base=10)
        axis.set(xlabel="training examples (log axis)", ylabel=label)
    figures.legend_below(figure, axes[0])
    table = Table(
        f"{title}: {metric} by the size of the training set",
        ("method", *(f"{n:,}" for n in sizes)),
        [
            *((method, *(spread(found[method, n]["scores"]) for n in sizes)) for method in methods),
            ("r = 1 minus full fine-tuning", *(str(differences[n]) for n in sizes)),
        ],
    )
    return part.section(
        TITLE,
        text=[
            "Schulman et al. 2025 found LoRA as good as full fine-tuning until its capacity is used up. Every run has "
            "the same number of steps, whatever the size of its training set; LoRA is at query and value."
        ],
        claims=[differences[n].words(f"With {n:,} examples: LoRA with r = 1", full) for n in sizes],
        tables=[table],
        figures={"capacity": figure},
    )
