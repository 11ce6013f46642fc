"""A run: one method trained once. Finished runs are lines of a file, so that a stopped study goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peftk.tools.study.methods import Method
from peftk.tools.study.tasks import DataError


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run's numbers depend on. train: so many examples of the training set. watched: how often forgetting is
    measured on the way. test, held_out, tokens: as in Settings."""

    task: str
    method: Method
    rate: float
    seed: int
    steps: int
    batch: int
    train: int
    test: int
    held_out: int
    tokens: int
    watched: int = 0

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def short(self) -> str:
        """A file name for what belongs to it."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.method.label}, learning rate {self.rate:g}, seed {self.seed}"


def _record(file: Path, number: int, line: str) -> tuple[str, dict[str, Any]]:
    try:
        record = json.loads(line)
        return json.dumps(record["run"], sort_keys=True), record
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}, line {number}: expected a finished run, got {line[:60]!r}") from error


class Store:
    """The file of finished runs. A line that a stopped process left unfinished is dropped.

    Raises DataError for a file of anything else.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        whole, newline, unfinished = text.rpartition("\n")
        self._found = dict(_record(file, *each) for each in enumerate(whole.splitlines(), 1))
        if unfinished:
            file.write_text(whole + newline, encoding="utf-8")

    def __len__(self) -> int:
        return len(self._found)

    def get(self, run: Run) -> dict[str, Any] | None:
        return self._found.get(run.key)

    def add(self, runs: Iterable[Run], results: Iterable[dict[str, Any]]) -> None:
        """All of them, by one write."""
        records = {
            run.key: {"run": dataclasses.asdict(run), **result} for run, result in zip(runs, results, strict=True)
        }
        with self._file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records.values()))
        self._found |= records
