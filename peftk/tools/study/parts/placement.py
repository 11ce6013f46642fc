"""Part 4: adapters of every span of layers are taken out of a trained model, in the form of Houlsby et al.'s figure 6.

Nothing is trained again. An adapter that is taken out has B = 0 and β = 0, and so is the identity.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peftk.nn import SeriesAdapter
from peftk.tools.study import figures, training
from peftk.tools.study.document import Section, Table
from peftk.tools.study.lab import Lab
from peftk.tools.study.methods import Method
from peftk.tools.study.part import Part, joined
from peftk.tools.study.statistics import NONE_FOUND, Interval, over_examples, signed
from peftk.tools.study.training import Alone
from peftk.tools.study.tuning import rates

NAME, TITLE = "placement", "Which layers' adapters matter"
METHOD = Method("series", 64)


def measure(lab: Lab) -> dict[str, Any]:
    return {"method": METHOD.label, "tasks": {task: _of_task(lab, task) for task in lab.settings.tasks}}


def _of_task(lab: Lab, task: str) -> dict[str, Any]:
    chosen = rates(lab, task, [METHOD])
    run = lab.run(task, METHOD, chosen[METHOD]["rate"], lab.settings.first_seed)
    lab.results([run], f"{task}, the model with adapters")
    side, layers = Alone(lab.trained(run), run), lab.layers
    data, features = lab.data(task), lab.features(task)
    labels, metric = data.test.labels, data.task.metric
    whole = training.predictions(side, 0, data, features, "test")
    spans = []
    for first in range(layers):
        for last in range(first, layers):
            with lab.stage.busy(f"{task}: without layers {first} to {last}"), without(side.model, first, last):
                found = training.predictions(side, 0, data, features, "test")
                spans.append({"first": first, "last": last, **over_examples(metric, labels, found, whole)._asdict()})
    most_frequent = max(set(labels), key=labels.count)
    return {
        "layers": layers,
        "whole": round(metric(labels, whole), 6),
        "constant": round(metric(labels, [most_frequent] * len(labels)), 6),
        "spans": spans,
    }


@contextlib.contextmanager
def without(model: nn.Module, first: int, last: int) -> Iterator[None]:
    """Inside, the series adapters of layers `first` to `last` are the identity."""
    out = [
        module
        for name, module in model.named_modules()
        if isinstance(module, SeriesAdapter) and first <= int(re.findall(r"\.layer\.(\d+)\.", name)[0]) <= last
    ]
    ups = [p for module in out for p in (module.lora_B, module.bias_B)]
    before = [p.detach().clone() for p in ups]
    with torch.no_grad():
        for p in ups:
            p.zero_()
        try:
            yield
        finally:
            for p, values in zip(ups, before, strict=True):
                p.copy_(values)


def section(part: Part) -> Section:
    tables, claims, drawn = [], [], {}
    for task, found in part.result["tasks"].items():
        title, metric, layers = part.task_title(task), part.metric(task), found["layers"]
        change = {
            (span["first"], span["last"]): Interval(span["mean"], span["low"], span["high"]) for span in found["spans"]
        }
        single = {n: change[n, n] for n in range(layers)}
        worst = min(single, key=lambda n: single[n].mean)
        equal = [str(n) for n in single if single[n].mean == single[worst].mean]
        named = f"layer{'s' * (len(equal) > 1)} {joined(equal)}"
        last, nothing = single[layers - 1], change[0, layers - 1]
        lower, upper = change[0, layers // 2 - 1], change[layers // 2, layers - 1]
        if single[worst].found and single[worst].mean < 0:
            message = f"{title}: of single layers, the adapters of {named} cost most, {single[worst]}"
        else:
            message = f"{title}: without any single layer's adapters {NONE_FOUND}; without all of them {nothing}"
        drawn[f"placement_{task}"] = _heat(part.message(message), metric, layers, change)
        tables.append(
            Table(
                f"{title}: change of {metric} without the adapters of these layers",
                ("first layer taken out", *(f"to layer {n}" for n in range(layers))),
                [(str(a), *("" if b < a else signed(change[a, b].mean) for b in range(layers))) for a in range(layers)],
            )
        )
        parts = {
            f"those of {named}, of single layers the worst": single[worst],
            "the last layer's adapters": last,
            "those of the lower half": lower,
            "those of the upper half": upper,
            "all adapters": nothing,
        }
        claims += [
            f"{title}, without {what}: {'' if interval.found else f'{NONE_FOUND}: '}{interval}."
            for what, interval in parts.items()
        ]
        claims.append(
            f"{title}: the whole model scores {found['whole']:.3f}, always the same answer {found['constant']:.3f}."
        )
    claims.append(
        "Found in the paper (BERT, 12 layers, CoLA and MNLI): taking out any single layer's adapters changes little, "
        "those of the lower layers matter less than those of the upper ones, and without all of them the score is "
        "that of the majority class."
    )
    return part.section(
        TITLE,
        text=[
            f"The form of figure 6 of Houlsby et al. 2019: out of one trained model ({part.result['method']}) the "
            "adapters of every contiguous span of layers are taken out, without training again."
        ],
        claims=claims,
        tables=tables,
        figures=drawn,
        caption="Layers are counted from 0, the lowest. One trained model a task; intervals are of the bootstrap over "
        "its test sentences, and say nothing of other seeds. *: the interval leaves out 0.",
    )


def _heat(message: str, metric: str, layers: int, change: dict[tuple[int, int], Interval]) -> Any:
    import numpy as np

    figure, (axis,) = figures.new(message, size=(6.6, 4.6))
    cells = np.full((layers, layers), np.nan)
    for (first, last), interval in change.items():
        cells[first, last] = interval.mean
    most = max(abs(interval.mean) for interval in change.values()) or 1.0
    drawn = axis.pcolormesh(cells, cmap="RdBu", vmin=-most, vmax=most, edgecolors=figures.GROUND, linewidth=1.5)
    for (first, last), interval in change.items():
        colour = "#ffffff" if abs(interval.mean) > 0.6 * most else "#111111"
        text = signed(interval.mean) + "*" * interval.found
        axis.text(last + 0.5, first + 0.5, text, ha="center", va="center", fontsize=8, color=colour)
    ticks = [n + 0.5 for n in range(layers)]
    axis.set_xticks(ticks, range(layers))
    axis.set_yticks(ticks, range(layers))
    axis.invert_yaxis()
    axis.grid(False)
    axis.set(xlabel="last layer taken out", ylabel="first layer taken out")
    figure.colorbar(drawn, ax=axis, label=f"change of {metric} (no unit)")
    return figure
