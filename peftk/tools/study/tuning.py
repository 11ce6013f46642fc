"""Learning rates: each family's is chosen from its grid by the score on held-out training data, with the first seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from peftk.tools.study.lab import Lab
from peftk.tools.study.methods import BITFIT, Method
from peftk.tools.study.runs import Run

# The row of each family for which its rate is chosen, unless it is chosen for every row.
CHOSEN_FOR = {
    "bitfit": BITFIT,
    "top": Method("top", 3),
    "series": Method("series", 8),
    "parallel": Method("parallel", 16),
    "lora": Method("lora", 8, "qv"),
}


def tuned(lab: Lab, method: Method) -> Method:
    """The method for which this one's learning rate is chosen."""
    chosen = method if lab.settings.tune_each else CHOSEN_FOR.get(method.kind, method)
    return dataclasses.replace(chosen, size=min(chosen.size, lab.layers)) if chosen.kind == "top" else chosen


def rates(lab: Lab, task: str, methods: Sequence[Method]) -> dict[Method, dict[str, Any]]:
    """By method: the rate, the grid with each rate's held-out score, and whose grid it is."""
    owners = {method: tuned(lab, method) for method in methods}
    grids: dict[Method, list[Run]] = {}
    for owner in dict.fromkeys(owners.values()):
        tried = owner.rates[-lab.settings.rates :]
        grids[owner] = [lab.run(task, owner, rate, lab.settings.first_seed) for rate in tried]
    records = iter(lab.results([run for grid in grids.values() for run in grid], f"{task}, learning rates"))
    found = {}
    for owner, grid in grids.items():
        scores = [{"rate": run.rate, **_held_out(next(records))} for run in grid]
        best = max(range(len(grid)), key=lambda n: (scores[n]["held_out"], -scores[n]["loss"]))
        lab.forget([run for n, run in enumerate(grid) if n != best])
        found[owner] = {
            "rate": grid[best].rate,
            "grid": scores,
            "of": owner.label,
            "edge": len(grid) > 1 and best in (0, len(grid) - 1),
        }
    return {method: found[owner] for method, owner in owners.items()}


def _held_out(record: dict[str, Any]) -> dict[str, float]:
    return {"held_out": record["held_out"], "loss": record["losses"][-1]}
