"""Where the parts of the study get their runs: finished ones from the file, others by training them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from peftk.tools.demo.stage import Stage
from peftk.tools.minilm import MiniLM
from peftk.tools.study import tasks, training
from peftk.tools.study.classifier import Classifier, Features
from peftk.tools.study.encoded import Encoded, TaskData, cut, encode
from peftk.tools.study.methods import Method
from peftk.tools.study.runs import Run, Store
from peftk.tools.study.settings import Settings
from peftk.tools.study.sweep import Together
from peftk.tools.study.training import Side, alone


class Lab:
    """The model, tasks and runs of a study. out: the folder of its files. data: None for the library's tasks."""

    def __init__(self, settings: Settings, data: Path | None, out: Path, stage: Stage) -> None:
        self.settings, self.out, self.stage = settings, out, stage
        self._folder = data
        with stage.busy("loading all-MiniLM-L6-v2"):
            self.minilm = MiniLM()
        out.mkdir(parents=True, exist_ok=True)
        self.store = Store(out / "runs.jsonl")

    @property
    def bert(self) -> Any:
        return self.minilm.plain

    @property
    def layers(self) -> int:
        return len(self.bert.encoder.layer)

    @functools.cache  # noqa: B019  # a study has one
    def data(self, task: str) -> TaskData:
        """Raises DataError."""
        splits = tasks.load(task, self._folder)
        return cut(tasks.TASKS[task], splits.train, splits.test, self.minilm.tokenizer, self.settings)

    @functools.cache  # noqa: B019
    def features(self, task: str) -> dict[str, Features]:
        data = self.data(task)
        return {part: Features(self.bert, getattr(data, part)) for part in ("train", "held_out", "test")}

    def run(self, task: str, method: Method, rate: float, seed: int = 0, **different: Any) -> Run:
        """A run of these settings, but for what is different."""
        s, data = self.settings, self.data(task)
        sizes = {"train": len(data.train), "test": len(data.test), "held_out": len(data.held_out)}
        return dataclasses.replace(
            Run(task, method, rate, seed, s.steps, s.batch, **sizes, tokens=s.tokens), **different
        )

    def results(self, runs: Sequence[Run], what: str = "") -> list[dict[str, Any]]:
        """The records of these runs, trained where they are not in the file. LoRA runs train in mixed batches."""
        missing = [run for run in dict.fromkeys(runs) if self.store.get(run) is None]
        groups = list(_groups(missing, self.settings.together))
        columns = (TextColumn("[dim]{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.stage.console,
            transient=True,
            disable=not self.stage.console.is_terminal,
        ) as bar:
            shown = bar.add_task(what or "training", total=sum(group[0].steps for group in groups))
            for group in groups:
                more = f" and {len(group) - 1} more in the same batch" if len(group) > 1 else ""
                bar.update(shown, description=f"{what}: {group[0]}{more}")
                self.store.add(group, self._train(group, lambda: bar.advance(shown)))
        return [found for run in runs if (found := self.store.get(run)) is not None]

    def _train(self, runs: Sequence[Run], on_step: Any) -> list[dict[str, Any]]:
        """The records; keeps the weights of the first seed's runs, which parts look into."""
        task = runs[0].task
        data, features = self.data(task), self.features(task)
        side: Side
        if runs[0].method.kind == "lora":
            side = Together(self.bert, data.task.classes, runs)
        else:
            side = alone(self.bert, data.task.classes, runs[0])
        records = training.train(side, data, features, self._watch, on_step)
        for number, run in enumerate(runs):
            if run.seed == self.settings.first_seed:
                file = self._weights(run)
                file.parent.mkdir(exist_ok=True)
                save_file(side.trained(number), file)
        return records

    def trained(self, run: Run) -> Classifier:
        """The whole model with what a run of the first seed trained; trains it again if its weights are gone."""
        model = training.injected(self.minilm.copy(), self.data(run.task).task.classes, run)
        file = self._weights(run)
        if not file.exists():
            self._train([run], lambda: None)
        values = load_file(file)
        unexpected = model.load_state_dict(values, strict=False).unexpected_keys
        assert not unexpected, unexpected
        return model

    def forget(self, runs: Sequence[Run]) -> None:
        """Removes the weights that runs have left behind, not their records."""
        for run in runs:
            self._weights(run).unlink(missing_ok=True)

    def _weights(self, run: Run) -> Path:
        return self.out / "weights" / f"{run.short}.safetensors"

    # ---- what an encoder could do before: SICK's relatedness, without any head

    @functools.cached_property
    def _source(self) -> tuple[Encoded, Encoded, list[float]]:
        pairs = tasks.relatedness(self._folder)[: self.settings.test]
        sides = [
            [tasks.Example(text, "", 0) for text in column]
            for column in ([p.text for p in pairs], [p.pair for p in pairs])
        ]
        first, second = (encode(self.minilm.tokenizer, side, self.settings.tokens) for side in sides)
        return first, second, [pair.label for pair in pairs]

    def source_ability(self, side: Side, number: int) -> float:
        """Pearson's r between SICK's relatedness and the cosine of the encoder's sentence vectors."""
        first, second, labels = self._source
        vectors = []
        with torch.inference_mode():
            for encoded in (first, second):
                found = torch.empty(len(encoded), self.bert.config.hidden_size)
                for rows in encoded.by_length(training.TEST_BATCH):
                    found[rows] = side.vectors(encoded.batch(rows), [number] * len(rows))
                vectors.append(F.normalize(found, dim=-1))
        return round(tasks.pearson(labels, (vectors[0] * vectors[1]).sum(-1).tolist()), 6)

    def _watch(self, side: Side, number: int) -> dict[str, float]:
        task = side.runs[number].task
        target = training.score(side, number, self.data(task), self.features(task), "test")
        return {"target": target, "source": self.source_ability(side, number)}


def _groups(runs: Sequence[Run], together: int) -> Iterator[list[Run]]:
    """What trains at once: LoRA runs that differ in seed, rank, placement, learning rate or training set."""
    mixed: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.method.kind == "lora":
            mixed.setdefault((run.task, run.steps, run.batch, run.watched), []).append(run)
        else:
            yield [run]
    for group in mixed.values():
        yield from (group[start : start + together] for start in range(0, len(group), together))
