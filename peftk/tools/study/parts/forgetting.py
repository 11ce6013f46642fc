"""Part 5: what is learnt of the target against what is left of the source, in the form of Biderman et al. 2024."""

from __future__ import annotations

from typing import Any

from peftk.tools.study import figures
from peftk.tools.study.document import Section, Table
from peftk.tools.study.lab import Lab
from peftk.tools.study.methods import BITFIT, FULL, Method
from peftk.tools.study.part import Part, average
from peftk.tools.study.statistics import paired, signed
from peftk.tools.study.tuning import rates

NAME, TITLE = "forgetting", "Learns less, forgets less"
METHODS = (FULL, *(Method("lora", r, "all") for r in (1, 8, 64)), BITFIT, Method("series", 64))
LOOKS = [figures.LOOKS["full fine-tuning"], ("#7fb2f0", "s"), ("#2f7de1", "o"), ("#5a62d8", "P")] + [
    figures.LOOKS[name] for name in ("BitFit", "series adapters")
]


def measure(lab: Lab) -> dict[str, Any]:
    task, s = lab.settings.tasks[0], lab.settings
    chosen = rates(lab, task, METHODS)
    runs = {
        m: [lab.run(task, m, chosen[m]["rate"], seed, watched=s.watched) for seed in s.fewer_seeds] for m in METHODS
    }
    lab.results([run for each in runs.values() for run in each], f"{task}, forgetting")
    return {
        "task": task,
        "methods": {m.label: [found["trace"] for found in lab.results(each)] for m, each in runs.items()},
    }


def section(part: Part) -> Section:
    task, traces = part.result["task"], part.result["methods"]
    title, metric = part.task_title(task), part.metric(task)
    losses = {label: [each[0]["source"] - each[-1]["source"] for each in found] for label, found in traces.items()}
    full = FULL.label
    most, least = (pick(losses, key=lambda label: average(losses[label])) for pick in (max, min))
    message = (
        f"Trained on {title}, {most} loses most of the encoder's relatedness (r {signed(-average(losses[most]))}), "
        f"{least} least ({signed(-average(losses[least]))})"
    )
    figure, (axis,) = figures.new(part.message(message), size=(7.2, 4.3))
    for (label, found), (colour, marker) in zip(traces.items(), LOOKS, strict=True):
        points = list(zip(*found, strict=True))
        xs, ys = ([average([seed[key] for seed in point]) for point in points] for key in ("target", "source"))
        axis.plot(xs, ys, color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=label)
        axis.plot(xs[-1:], ys[-1:], color=colour, marker=marker, markersize=8)
    axis.set(
        xlabel=f"learnt: {metric} on {title} (no unit)",
        ylabel="kept: Pearson r of SICK relatedness\nand the untrained cosine (no unit)",
    )
    figures.legend_below(figure, axis, columns=3)
    rows = []
    for label, found in traces.items():
        kept = paired(losses[label], losses[full])
        rows.append(
            (
                label,
                f"{average([each[-1]['target'] for each in found]):.3f}",
                f"{average([each[0]['source'] for each in found]):.3f}",
                f"{average([each[-1]['source'] for each in found]):.3f}",
                "" if label == full else str(kept),
            )
        )
    return part.section(
        TITLE,
        text=[
            "The form of Biderman et al. 2024. The ability of the source is the encoder's own: Pearson's r between "
            "SICK's relatedness and the cosine of its sentence vectors, of the trial set's pairs, without a head. It "
            "was never trained here; training on the target moves it."
        ],
        claims=[
            paired([-loss for loss in losses[label]], [-loss for loss in losses[full]]).words(
                f"Change of the source's r: {label}", full
            )
            for label in traces
            if label != full
        ],
        tables=[
            Table(
                f"After training on {title}",
                (
                    "method",
                    f"target: {metric}",
                    "source before: r",
                    "source after: r",
                    "lost more than full fine-tuning",
                ),
                rows,
            )
        ],
        figures={"forgetting": figure},
        caption="Along each line training goes on; the large symbol is its end. No perplexity of a language model was "
        "measured.",
    )
