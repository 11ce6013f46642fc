"""Part 6: in how many directions weights change, and whether the change brings directions that W₀ did not have.

Intruder dimensions: Shuttleworth et al. 2024 (arXiv 2410.21228): singular vectors of W′ that are like none of W₀'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftk.methods.inject import lora_layers
from peftk.nn import LoRALinear
from peftk.tools.study import figures
from peftk.tools.study.classifier import Classifier
from peftk.tools.study.document import Section, Table
from peftk.tools.study.lab import Lab
from peftk.tools.study.methods import FULL, Method
from peftk.tools.study.part import Part, average
from peftk.tools.study.tuning import rates

NAME, TITLE = "spectra", "Spectra of the change"
METHODS = (FULL, *(Method("lora", r, "all") for r in (1, 8, 64)))
ENERGY = 0.9
FIRST = 10  # of the singular vectors of W′ so many are looked at
ALIKE = 0.5  # the largest cosine with a vector of W₀ below which one is an intruder
KINDS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention output": "attention.output.dense",
    "MLP in": "intermediate.dense",
    "MLP out": "output.dense",
}


def measure(lab: Lab) -> dict[str, Any]:
    task = lab.settings.tasks[0]
    chosen = rates(lab, task, METHODS)
    runs = [lab.run(task, m, chosen[m]["rate"], lab.settings.first_seed) for m in METHODS]
    lab.results(runs, f"{task}, spectra")
    plain = _weights(Classifier(lab.minilm.copy(), 2, 0))
    matrices = []
    for run in runs:
        with lab.stage.busy(f"singular values: {run.method.label}"):
            for name, W in _weights(lab.trained(run)).items():
                matrices.append({"method": run.method.label, "matrix": name, **_compare(plain[name], W)})
    return {"task": task, "matrices": matrices}


def _weights(model: Classifier) -> dict[str, Tensor]:
    """W, or W₀ + s·BA, of every adapted linear, in fp64."""
    changes = {
        name: layer.scaling * layer.lora_B.double() @ layer.lora_A.double() for name, layer in lora_layers(model)
    }
    found = {}
    for name, module in model.named_modules():
        if ".encoder." in name and isinstance(module, (torch.nn.Linear, LoRALinear)):
            W = module.weight.detach().double()
            found[name] = W + changes[name].detach() if name in changes else W
    return found


def _compare(W0: Tensor, W: Tensor) -> dict[str, int]:
    U0, S0, _ = torch.linalg.svd(W0, full_matrices=False)
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    return {
        "before": directions(S0),
        "change": directions(torch.linalg.svdvals(W - W0)),
        "after": directions(S),
        "intruders": intruders(U0, U),
        "size": min(W.shape),
    }


def directions(values: Tensor) -> int:
    """How many of these singular values, from the largest on, hold 90 % of the energy Σσ²; 0 if all are 0."""
    energy = values.square().cumsum(0)
    return 0 if energy[-1] == 0 else int((energy < ENERGY * energy[-1]).sum()) + 1


def intruders(before: Tensor, after: Tensor) -> int:
    """Of the first ten left singular vectors `after` [N, n], those whose cosine with each of `before` is below 0.5."""
    cosines = (before.T @ after[:, :FIRST]).abs().amax(0)
    return int((cosines < ALIKE).sum())


def section(part: Part) -> Section:
    task, matrices = part.result["task"], part.result["matrices"]
    title = part.task_title(task)
    methods = list(dict.fromkeys(row["method"] for row in matrices))

    def values(method: str, key: str, kind: str = "") -> list[float]:
        ending = f".{KINDS[kind]}" if kind else ""
        return [
            row[key]
            for row in matrices
            if row["method"] == method
            and row["matrix"].endswith(ending)
            and not (kind == "MLP out" and "attention" in row["matrix"])
        ]

    strangers = {method: sum(values(method, "intruders")) for method in methods}
    of_full = average(values(methods[0], "change"))
    size = matrices[0]["size"]
    message = (
        f"{title}: {of_full:.0f} of {size} directions hold {ENERGY:.0%} of full fine-tuning's ΔW on average. "
        f"Intruders: {', '.join(f'{_brief(method)}: {strangers[method]}' for method in methods)}"
    )
    figure, axes = figures.new(part.message(message), columns=2, size=(8.4, 3.9))
    for axis, key, label in zip(
        axes,
        ("change", "intruders"),
        ("directions of ΔW", f"intruders of {FIRST}"),
        strict=True,
    ):
        for method, (colour, marker) in zip(methods, (figures.LOOKS[FULL.label], *figures.ANY), strict=False):
            means = [average(values(method, key, kind)) for kind in KINDS]
            look = {"color": colour, "marker": marker, "markersize": 5}
            axis.plot(range(len(KINDS)), means, linestyle=":", linewidth=0.8, label=_brief(method), **look)
        axis.set_xticks(range(len(KINDS)), list(KINDS), rotation=35, ha="right")
        axis.set_ylabel(f"{label} (mean count)")
    axes[1].set_ylim(bottom=0, top=max(1.0, axes[1].get_ylim()[1]))
    axes[0].set_yscale("log", base=2)
    ticks = [2**n for n in range(0, 10, 2)]
    axes[0].set_yticks(ticks, map(str, ticks))
    axes[0].minorticks_off()
    figures.legend_below(figure, axes[0])
    rows = [
        (
            f"{_brief(method)}, {kind}",
            *(f"{average(values(method, key, kind)):.1f}" for key in ("before", "change", "after", "intruders")),
        )
        for method in methods
        for kind in KINDS
    ]
    return part.section(
        TITLE,
        text=[
            f"How many singular vectors hold {ENERGY:.0%} of the energy of W₀, ΔW and W′ = W₀ + ΔW, and how many of "
            f"the first {FIRST} left singular vectors of W′ are intruders (Shuttleworth et al. 2024): no vector of "
            f"W₀ has a cosine of {ALIKE} or more with them."
        ],
        claims=[
            f"{_brief(method)}: {strangers[method]} intruders in {len(values(method, 'intruders'))} matrices, "
            f"{average(values(method, 'change')):.1f} directions hold {ENERGY:.0%} of ΔW (one model, no interval)."
            for method in methods
        ],
        tables=[
            Table(
                f"{title}: counts, means over layers",
                ("method and matrix", "W₀", "ΔW", "W′", f"intruders of {FIRST}"),
                rows,
            )
        ],
        figures={"spectra": figure},
        caption="One trained model a method; LoRA at all six linears of every layer.",
    )


def _brief(label: str) -> str:
    return label.split(", all")[0]
