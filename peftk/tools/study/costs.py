"""What methods cost: time and memory of a training step, latency merged and unmerged, many runs in one batch or not.

Sides take turns within one run; figures are medians. Everything is measured on whole models, all layers of which run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import peftk
from peftk.methods.inject import lora_layers
from peftk.system.timing import interleave
from peftk.tools.benchmark.peak_memory import peak_bytes
from peftk.tools.benchmark.quiet import Watch
from peftk.tools.study.classifier import Classifier
from peftk.tools.study.encoded import training_batches
from peftk.tools.study.lab import Lab
from peftk.tools.study.methods import Method
from peftk.tools.study.runs import Run
from peftk.tools.study.sweep import Together
from peftk.tools.study.training import Alone, Side, Trainer, injected

FOR_EVER = 10**9  # steps: the learning rate stays about where it is
SEED = 0
SAME = 1e-4  # the largest difference between logits, which are about 1, of one model computed in two ways in fp32


def of_methods(lab: Lab, task: str, methods: Sequence[Method]) -> dict[str, Any]:
    """By label: ms of a step and of a forward, MiB of a step; not_run: the share of time that others took."""
    data, features = lab.data(task), lab.features(task)
    rows = next(training_batches(data.train, len(data.train), lab.settings.batch, SEED))
    runs = {m.label: lab.run(task, m, m.rates[0], SEED, steps=FOR_EVER) for m in methods}
    models = {label: injected(lab.minilm.copy(), data.task.classes, run) for label, run in runs.items()}
    trainers = {
        label: Trainer(Alone(models[label], run), features["train"], data.train.labels) for label, run in runs.items()
    }
    steps = {label: _step(trainer, [rows]) for label, trainer in trainers.items()}
    peaks = {}
    for label, step in steps.items():
        step()  # makes the optimizer's state
        peaks[label] = peak_bytes(step) / 2**20
    watch = Watch()
    step_times = interleave(steps, seconds=lab.settings.timing_seconds)
    batch = data.train.batch(rows)
    merged = {label: _merged(model) for label, model in models.items() if any(lora_layers(model))}
    plain = Classifier(lab.minilm.copy(), data.task.classes, SEED)
    with torch.inference_mode():
        for label, model in merged.items():
            difference = (model(**batch) - models[label](**batch)).abs().max().item()
            if difference > SAME:
                raise RuntimeError(f"{label}: merged and unmerged differ by {difference:g}")
        forwards = {"": plain, **models, **{f"{label}, merged": model for label, model in merged.items()}}
        times = interleave(
            {label: _forward(model, batch) for label, model in forwards.items()},
            seconds=lab.settings.timing_seconds / 2,
        )
    found = {
        label: {
            "step_ms": round(step_times[label].median_us / 1000, 2),
            "peak_mib": round(peaks[label], 1),
            "forward_ms": round(times[label].median_us / 1000, 2),
            "merged_ms": round(times[f"{label}, merged"].median_us / 1000, 2) if label in merged else None,
        }
        for label in runs
    }
    return {
        "methods": found,
        "plain_ms": round(times[""].median_us / 1000, 2),
        "sentences": len(rows),
        "tokens": batch["attention_mask"].numel(),
        "not_run": watch.not_run(),
    }


def of_together(lab: Lab, task: str, method: Method, count: int, rows_each: int) -> dict[str, Any]:
    """ms of a step of `count` runs of one LoRA method with other seeds: in one mixed batch, and one after another."""
    data, features = lab.data(task), lab.features(task)
    runs = [lab.run(task, method, method.rates[0], seed, steps=FOR_EVER, batch=rows_each) for seed in range(count)]
    drawn = [next(training_batches(data.train, run.train, rows_each, run.seed)) for run in runs]

    def trainer(side: Side) -> Trainer:
        return Trainer(side, features["train"], data.train.labels)

    def own_model(run: Run) -> Alone:
        return Alone(injected(lab.minilm.copy(), data.task.classes, run), run)

    mixed = trainer(Together(lab.bert, data.task.classes, runs))
    separate = [trainer(own_model(run)) for run in runs]
    losses = mixed.step(drawn), [own.step([rows])[0] for own, rows in zip(separate, drawn, strict=True)]
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    if difference > SAME:
        raise RuntimeError(f"mixed batch: its losses differ by {difference:g} from those of each run alone")
    watch = Watch()
    times = interleave(
        {
            "mixed": lambda: mixed.step(drawn),
            "separate": lambda: [own.step([rows]) for own, rows in zip(separate, drawn, strict=True)],
        },
        seconds=lab.settings.timing_seconds / 3,
    )
    return {
        "adapters": count,
        "rows": rows_each,
        **{f"{name}_ms": round(side.median_us / 1000, 2) for name, side in times.items()},
        "difference": difference,
        "not_run": watch.not_run(),
    }


def _merged(model: Classifier) -> Classifier:
    import copy

    merged = copy.deepcopy(model)
    peftk.merge_adapter(merged)
    return merged


def _step(trainer: Trainer, drawn: list[list[int]]) -> Any:
    return lambda: trainer.step(drawn)


def _forward(model: Classifier, batch: dict[str, torch.Tensor]) -> Any:
    return lambda: model(**batch)
