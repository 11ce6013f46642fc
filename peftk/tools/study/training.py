"""The training loop, the same for one run and for many runs in one mixed batch.

AdamW without weight decay; the learning rate rises over the first tenth of the steps, then falls linearly to 0; the
gradient of a run is clipped to norm 1; there is no dropout. The same seed gives the same numbers.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftk.tools.study.classifier import Classifier, Features, above, mean_of_tokens
from peftk.tools.study.encoded import Encoded, TaskData, training_batches
from peftk.tools.study.runs import Run

WARMUP = 0.1
MOST_NORM = 1.0
TEST_BATCH = 64


class Side(Protocol):
    """A model that trains some runs. first_layer: its inputs are what the layer below this one returns."""

    first_layer: int

    @property
    def runs(self) -> Sequence[Run]:
        """All of one task, batch size and number of steps."""

    def parameters(self, number: int) -> list[nn.Parameter]:
        """What run `number` trains."""

    def vectors(self, batch: dict[str, Tensor], owners: list[int]) -> Tensor:
        """[B, d], the means over tokens; row b is computed by run owners[b]."""

    def logits(self, batch: dict[str, Tensor], owners: list[int]) -> Tensor:
        """[B, classes]."""

    def trained(self, number: int) -> dict[str, Tensor]:
        """The trained values, by their names in a Classifier into which the method was injected."""


class Alone:
    """One run, of any method, on a model of its own, which begins with layer `first_layer`."""

    def __init__(self, model: Classifier, run: Run, first_layer: int = 0) -> None:
        self.runs, self.model, self.first_layer = (run,), model, first_layer

    def parameters(self, number: int) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def vectors(self, batch: dict[str, Tensor], owners: list[int]) -> Tensor:
        return mean_of_tokens(self.model.bert(**batch).last_hidden_state, batch["attention_mask"])

    def logits(self, batch: dict[str, Tensor], owners: list[int]) -> Tensor:
        return self.model(**batch)

    def trained(self, number: int) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {_in_whole_model(name, self.first_layer): p.detach().clone() for name, p in named if p.requires_grad}


def alone(bert: nn.Module, classes: int, run: Run) -> Alone:
    """A new run; layers below the lowest that changes are left out, unless the encoder is watched."""
    layers: Any = bert.get_submodule("encoder.layer")
    first_layer = 0 if run.watched else run.method.first_layer(len(layers))
    return Alone(injected(above(bert, first_layer), classes, run), run, first_layer)


def injected(bert: nn.Module, classes: int, run: Run) -> Classifier:
    """A new Classifier with the run's method in it, before its first step."""
    model = Classifier(bert, classes, run.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        run.method.inject(model)
    if run.method.kind == "lora":
        start_lora(model.named_parameters(), run.seed)
    return model


def start_lora(parameters: Iterable[tuple[str, nn.Parameter]], seed: int) -> None:
    """Draws every A uniformly from ±1/√K, by the seed and the linear's name: the same alone and in a mixed batch."""
    with torch.no_grad():
        for name, p in parameters:
            if ".lora_A" in name:
                linear = name[name.index("encoder.") : name.index(".lora_A")]
                generator = torch.Generator().manual_seed(zlib.crc32(f"{linear} {seed}".encode()))
                p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) / p.shape[1] ** 0.5)


def _in_whole_model(name: str, first_layer: int) -> str:
    before, layer, after = name.partition("encoder.layer.")
    number, _, rest = after.partition(".")
    return f"{before}{layer}{int(number) + first_layer}.{rest}" if layer else name


class Trainer:
    """The optimizer of a side, and its step."""

    def __init__(self, side: Side, features: Features, labels: Sequence[float]) -> None:
        self._side, self._features, self._labels = side, features, labels
        self._groups = [side.parameters(number) for number in range(len(side.runs))]
        self._optimizer = torch.optim.AdamW(
            [{"params": group, "lr": run.rate} for group, run in zip(self._groups, side.runs, strict=True)],
            weight_decay=0.0,
            fused=True,
        )
        steps = side.runs[0].steps
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: rate_factor(step, steps))

    def step(self, drawn: Sequence[list[int]]) -> list[float]:
        """One step of all runs, each on its own rows; their losses. A run's gradient is that of its own mean loss."""
        rows = [row for own in drawn for row in own]
        owners = [number for number, own in enumerate(drawn) for _ in own]
        logits = self._side.logits(self._features.batch(rows, self._side.first_layer), owners)
        labels = torch.tensor([self._labels[row] for row in rows])
        lengths = [len(own) for own in drawn]
        losses = [
            loss_of(own_logits, own_labels)
            for own_logits, own_labels in zip(logits.split(lengths), labels.split(lengths), strict=True)
        ]
        self._optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        for group in self._groups:
            nn.utils.clip_grad_norm_(group, MOST_NORM)
        self._optimizer.step()
        self._schedule.step()
        return [loss.item() for loss in losses]


def rate_factor(step: int, steps: int) -> float:
    """The share of the learning rate at a step, counted from 0: rises over the first tenth, then falls to 0."""
    warmup = max(1, round(WARMUP * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup + 1)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy, or squared error of a regression."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels.float())
    return F.cross_entropy(logits, labels.long())


def train(
    side: Side,
    data: TaskData,
    features: dict[str, Features],
    watch: Callable[[Side, int], dict[str, float]],
    on_step: Callable[[], object],
) -> list[dict[str, Any]]:
    """Trains all runs of a side; a record of each. watch(side, number): what is measured on the way of watched runs."""
    runs, first = side.runs, side.runs[0]
    trainer = Trainer(side, features["train"], data.train.labels)
    batches = [training_batches(data.train, run.train, run.batch, run.seed) for run in runs]
    stops = {round(first.steps * n / first.watched) for n in range(first.watched + 1)} if first.watched else set()
    losses: list[list[float]] = []
    traces: list[list[dict[str, float]]] = [[] for _ in runs]
    seconds = 0.0
    for step in range(first.steps + 1):
        if step in stops:
            for number, trace in enumerate(traces):
                trace.append({"step": step, **watch(side, number)})
        if step < first.steps:
            began = time.perf_counter()
            losses.append(trainer.step([next(each) for each in batches]))
            seconds += time.perf_counter() - began
            on_step()
    return [
        {
            "held_out": score(side, number, data, features, "held_out"),
            "score": score(side, number, data, features, "test"),
            "losses": tenths([each[number] for each in losses]),
            "seconds": round(seconds, 2),
            "together": len(runs),
            "trace": traces[number],
        }
        for number in range(len(runs))
    ]


def score(side: Side, number: int, data: TaskData, features: dict[str, Features], part: str) -> float:
    """The task's metric on its held-out or test examples."""
    found = predictions(side, number, data, features, part)
    return round(data.task.metric(getattr(data, part).labels, found), 6)


def predictions(side: Side, number: int, data: TaskData, features: dict[str, Features], part: str) -> list[float]:
    """The class, or the number of a regression, of each held-out or test example."""
    examples: Encoded = getattr(data, part)
    predicted = [0.0] * len(examples)
    with torch.inference_mode():
        for rows in examples.by_length(TEST_BATCH):
            logits = side.logits(features[part].batch(rows, side.first_layer), [number] * len(rows))
            found = logits[:, 0] if data.task.classes == 1 else logits.argmax(-1)
            for row, prediction in zip(rows, found.tolist(), strict=True):
                predicted[row] = prediction
    return predicted


def tenths(values: Sequence[float]) -> list[float]:
    """The means over the first, second, … tenth of the values."""
    count = min(10, len(values))
    cuts = [len(values) * n // count for n in range(count + 1)]
    return [round(sum(values[a:b]) / (b - a), 5) for a, b in itertools.pairwise(cuts)]
