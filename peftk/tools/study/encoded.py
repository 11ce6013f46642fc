"""A task's sentences as tokens, cut into batches of sentences of about one length."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftk.tools.study.settings import Settings
from peftk.tools.study.tasks import Example, Task

WINDOW = 16  # batches that are sorted by length together
ORDER_SEED = 1234


class Encoded(NamedTuple):
    """Token ids of sentences, [CLS] and [SEP] included, and which of them belong to the second sentence."""

    ids: list[list[int]]
    types: list[list[int]]
    labels: list[float]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The model's inputs for these rows, padded to the longest."""
        longest = max(len(self.ids[row]) for row in rows)
        ids, types, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
        for place, row in enumerate(rows):
            length = len(self.ids[row])
            ids[place, :length] = torch.tensor(self.ids[row])
            types[place, :length] = torch.tensor(self.types[row])
            mask[place, :length] = 1
        return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}

    def by_length(self, size: int) -> list[list[int]]:
        """All rows, in batches of `size`, of sentences of about one length."""
        rows = sorted(range(len(self)), key=lambda row: (len(self.ids[row]), row))
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def encode(tokenizer: Any, examples: Sequence[Example], tokens: int) -> Encoded:
    texts = [example.text for example in examples]
    pairs = [example.pair for example in examples] if examples[0].pair else None
    found = tokenizer(texts, pairs, truncation=True, max_length=tokens, return_token_type_ids=True)
    return Encoded(found["input_ids"], found["token_type_ids"], [example.label for example in examples])


class TaskData(NamedTuple):
    """The same for all runs of a study. source_sizes: of the whole training and test set, before they were cut."""

    task: Task
    train: Encoded
    held_out: Encoded
    test: Encoded
    source_sizes: tuple[int, int]


def cut(task: Task, train: Sequence[Example], test: Sequence[Example], tokenizer: Any, settings: Settings) -> TaskData:
    """Draws a part of each set, always the same. Held-out examples are training examples that no run trains on."""
    shuffled = [random.Random(ORDER_SEED).sample(list(part), len(part)) for part in (train, test)]
    held = min(settings.held_out, len(train) // 4)
    parts: tuple[list[Example], ...]
    parts = shuffled[0][held:][: settings.train], shuffled[0][:held], shuffled[1][: settings.test]
    if task.classes == 1:
        parts = _standardised(parts)
    encoded = [encode(tokenizer, part, settings.tokens) for part in parts]
    return TaskData(task, encoded[0], encoded[1], encoded[2], (len(train), len(test)))


def _standardised(parts: tuple[list[Example], ...]) -> tuple[list[Example], ...]:
    """A regression's labels with the mean 0 and the deviation 1 of the training set."""
    labels = [example.label for example in parts[0]]
    mean, deviation = statistics.fmean(labels), statistics.pstdev(labels) or 1.0
    return tuple([example._replace(label=(example.label - mean) / deviation) for example in part] for part in parts)


def training_batches(data: Encoded, size: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Batches of `batch` of the first `size` rows, without end. The seed says which sentences are in a batch.

    Every window of 16 batches is sorted by length first, which saves padding. In which order the batches of a window
    come is the same for all seeds: so those of one step are of about one length, and fit into one mixed batch.
    """
    own, common = random.Random(seed), random.Random(ORDER_SEED)
    rows = list(range(min(size, len(data))))
    while True:
        own.shuffle(rows)
        whole = [rows[start : start + batch * WINDOW] for start in range(0, len(rows), batch * WINDOW)]
        for window in whole:
            ordered = sorted(window, key=lambda row: len(data.ids[row]))
            batches = [ordered[start : start + batch] for start in range(0, len(ordered), batch)]
            common.shuffle(batches)
            yield from batches
