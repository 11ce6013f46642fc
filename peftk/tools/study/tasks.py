"""The tasks: CoLA, SST-2 and SICK, read from a folder of files or, where there is none, by the `datasets` library.

CoLA: Warstadt, Singh and Bowman 2018. SST-2: Socher et al. 2013. SICK: Marelli et al. 2014.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Numbers = Sequence[float]


class DataError(ValueError):
    """A folder, file or library that does not have what a task needs; the message says where and what."""


class Example(NamedTuple):
    """label: a class, or a number for a regression. pair: the second sentence, "" if there is none."""

    text: str
    pair: str
    label: float


class Splits(NamedTuple):
    train: list[Example]
    test: list[Example]


class Task(NamedTuple):
    """classes: 1 for a regression. metric: of labels and predictions, larger is better, no unit."""

    name: str
    title: str
    classes: int
    metric_name: str
    metric: Callable[[Numbers, Numbers], float]
    terms: str


def matthews(labels: Numbers, predictions: Numbers) -> float:
    """Matthews' correlation coefficient of two classes, 0 and 1; 0 if all labels or all predictions are the same.

    It is Pearson's r of these numbers. Bootstraps call it thousands of times.
    """
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(np.corrcoef(labels, predictions)[0, 1])


def accuracy(labels: Numbers, predictions: Numbers) -> float:
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def pearson(labels: Numbers, predictions: Numbers) -> float:
    """Pearson's r; 0 where it is not defined, as one side is constant."""
    from scipy import stats

    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(stats.pearsonr(labels, predictions).statistic)


TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", 2, "Matthews correlation", matthews, "Warstadt et al. 2018, for research"),
        Task("sst2", "SST-2", 2, "accuracy", accuracy, "Socher et al. 2013"),
        Task("sick", "SICK entailment", 3, "accuracy", accuracy, "Marelli et al. 2014, CC BY-NC-SA"),
        Task("sick_r", "SICK relatedness", 1, "Pearson r", pearson, "Marelli et al. 2014, CC BY-NC-SA"),
    )
}
ENTAILMENT = ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")


def load(name: str, folder: Path | None) -> Splits:
    """The task's training and test examples, from the folder or, for None, from the `datasets` library.

    Raises DataError for an unknown task, a missing folder or file, or one with other columns or labels.
    """
    if name not in TASKS:
        raise DataError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    splits = _from_library(name) if folder is None else _from_folder(name, folder)
    for part, examples in splits._asdict().items():
        if not examples:
            raise DataError(f"{name}: expected some {part} examples, got none")
    return splits


def relatedness(folder: Path | None) -> list[Example]:
    """The pairs of SICK's trial set, labelled with their relatedness, 1 to 5. Raises DataError."""
    if folder is None:
        return [_hub_sick(row, "sick_r") for row in _split("sick", None, "validation")]
    return _sick(folder / "sick" / "SICK_trial.txt", "sick_r")


def _from_folder(name: str, folder: Path) -> Splits:
    if not folder.is_dir():
        raise DataError(f"--data: expected a folder with cola/, sst2/ and sick/, got {folder}, which is no folder")
    if name == "cola":
        files = [folder / "cola" / f"{part}.tsv" for part in ("in_domain_train", "in_domain_dev", "out_of_domain_dev")]
        train, *dev = (_tsv(file, 4, label=1, text=3) for file in files)
        return Splits(train, [example for part in dev for example in part])
    if name == "sst2":
        return Splits(*(_tsv(folder / "sst2" / f"{part}.tsv", 2, label=1, text=0) for part in ("train", "dev")))
    return Splits(*(_sick(folder / "sick" / f"SICK_{part}.txt", name) for part in ("train", "test_annotated")))


def _lines(file: Path) -> list[list[str]]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"--data: expected the file {file}, got none that can be read ({error.strerror})") from error
    return [line.split("\t") for line in text.split("\n") if line.strip()]


def _tsv(file: Path, columns: int, *, label: int, text: int) -> list[Example]:
    found = []
    for number, row in enumerate(_lines(file), 1):
        if len(row) != columns or row[label] not in ("0", "1"):
            raise DataError(
                f"{file}, line {number}: expected {columns} columns with tabs between, and a label 0 or 1 in column "
                f"{label + 1}, got {len(row)} columns: {row[:columns]}"
            )
        found.append(Example(row[text].strip(), "", int(row[label])))
    return found


def _sick(file: Path, name: str) -> list[Example]:
    header, *rows = _lines(file) or [[]]
    wanted = ("sentence_A", "sentence_B", "relatedness_score", "entailment_judgment")
    missing = [column for column in wanted if column not in header]
    if missing:
        raise DataError(f"{file}, line 1: expected columns {', '.join(wanted)}, got {header}")
    found = []
    for number, row in enumerate(rows, 2):
        cells = dict(zip(header, (cell.strip() for cell in row), strict=False))
        try:
            a, b, score, judgment = (cells[column] for column in wanted)
            label = float(score) if name == "sick_r" else ENTAILMENT.index(judgment)
        except (KeyError, ValueError) as error:
            raise DataError(
                f"{file}, line {number}: expected {len(header)} columns, a number as relatedness_score and one of "
                f"{', '.join(ENTAILMENT)}, got {row}"
            ) from error
        found.append(Example(a, b, label))
    return found


def _from_library(name: str) -> Splits:
    if name in ("cola", "sst2"):
        found = [
            [Example(row["sentence"], "", int(row["label"])) for row in _split("nyu-mll/glue", name, part)]
            for part in ("train", "validation")
        ]
    else:
        found = [[_hub_sick(row, name) for row in _split("sick", None, part)] for part in ("train", "test")]
    return Splits(*found)


def _hub_sick(row: dict[str, Any], name: str) -> Example:
    label = float(row["relatedness_score"]) if name == "sick_r" else int(row["label"])
    return Example(row["sentence_A"], row["sentence_B"], label)


def _split(dataset: str, config: str | None, part: str) -> Any:
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise DataError(
            "--data: expected a folder with cola/, sst2/ and sick/, got none; without it the tasks come from the "
            "datasets library, which is not installed: pip install datasets"
        ) from error
    try:
        return datasets.load_dataset(dataset, config, split=part)
    except Exception as error:  # whatever a network or a cache raises
        raise DataError(
            f"{dataset}: the datasets library could not load it ({error}); --data takes a folder"
        ) from error
