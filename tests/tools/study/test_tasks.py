"""Readers and metrics of the study's tasks, and what they say about other files."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from sklearn import metrics

from peftk.tools.study import tasks
from peftk.tools.study.tasks import DataError, Example
from tests.support.small_study import write_data


def test_files_are_read_as_they_are_written(tmp_path):
    folder = write_data(tmp_path)
    cola, sst2, sick, related = (tasks.load(name, folder) for name in ("cola", "sst2", "sick", "sick_r"))
    assert [len(part) for part in cola] == [60, 24]  # both development sets
    assert [len(part) for part in sst2] == [60, 20]
    assert [len(part) for part in sick] == [len(part) for part in related] == [40, 16]
    line = (folder / "cola/in_domain_train.tsv").read_text().splitlines()[3].split("\t")
    assert cola.train[3] == Example(line[3], "", int(line[1]))
    row = (folder / "sick/SICK_train.txt").read_text().splitlines()[2].split("\t")
    assert sick.train[1] == Example(row[1], row[2], tasks.ENTAILMENT.index(row[4]))
    assert related.train[1] == Example(row[1], row[2], float(row[3]))
    assert len(tasks.relatedness(folder)) == 12


def test_quotes_and_stars_are_text(tmp_path):
    folder = write_data(tmp_path)
    (folder / "cola/in_domain_train.tsv").write_text('gj04\t0\t*\tHe "said so.\ngj04\t1\t\tShe" did.\n')
    assert [example.text for example in tasks.load("cola", folder).train] == ['He "said so.', 'She" did.']


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("cola/in_domain_train.tsv", None, "in_domain_train.tsv, got none"),
        ("cola/in_domain_train.tsv", "a sentence without columns\n", "line 1: expected 4 columns"),
        ("cola/in_domain_train.tsv", "gj04\t2\t\tA label that is none.\n", "line 1: expected .* label 0 or 1"),
        ("cola/in_domain_train.tsv", "", "expected some train examples, got none"),
    ],
)
def test_bad_cola(tmp_path, file, text, said):
    folder = write_data(tmp_path)
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(DataError, match=said):
        tasks.load("cola", folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pair\tA\tB\n1\tx\ty\n", "line 1: expected columns sentence_A, sentence_B"),
        ("sentence_A\tsentence_B\trelatedness_score\tentailment_judgment\nx\ty\t3.0\tMAYBE\n", "line 2: .*ENTAILMENT"),
        ("sentence_A\tsentence_B\trelatedness_score\tentailment_judgment\nx\ty\n", "line 2: expected 4 columns"),
        ("", "line 1: expected columns"),
    ],
)
def test_bad_sick(tmp_path, text, said):
    folder = write_data(tmp_path)
    (folder / "sick/SICK_train.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        tasks.load("sick", folder)


def test_a_missing_folder_and_an_unknown_task(tmp_path):
    with pytest.raises(DataError, match=r"--data: expected a folder .*nowhere"):
        tasks.load("cola", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"task: expected one of cola, sst2, sick, sick_r, got 'mnli'"):
        tasks.load("mnli", tmp_path)


def test_without_a_folder_the_library_loads(monkeypatch):
    rows = {
        ("nyu-mll/glue", "sst2", "train"): [{"sentence": "good", "label": 1, "idx": 0}],
        ("nyu-mll/glue", "sst2", "validation"): [{"sentence": "bad", "label": 0, "idx": 0}],
        ("sick", None, "train"): [{"sentence_A": "a", "sentence_B": "b", "label": 2, "relatedness_score": 3.5}],
        ("sick", None, "test"): [{"sentence_A": "c", "sentence_B": "d", "label": 0, "relatedness_score": 1.0}],
    }
    library = types.ModuleType("datasets")
    library.load_dataset = lambda name, config, split: rows[name, config, split]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert tasks.load("sst2", None) == ([Example("good", "", 1)], [Example("bad", "", 0)])
    assert tasks.load("sick", None) == ([Example("a", "b", 2)], [Example("c", "d", 0)])
    assert tasks.load("sick_r", None).train == [Example("a", "b", 3.5)]
    with pytest.raises(DataError, match=r"nyu-mll/glue: the datasets library could not load"):
        tasks.load("cola", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"--data: .*pip install datasets"):
        tasks.load("cola", None)


def test_metrics_are_those_of_the_textbooks():
    drawn = np.random.default_rng(0)
    labels, predictions = drawn.integers(0, 2, 50), drawn.integers(0, 2, 50)
    for these in (predictions, labels, 1 - labels, np.ones(50)):
        assert tasks.matthews(labels, these) == pytest.approx(metrics.matthews_corrcoef(labels, these))
    assert tasks.accuracy([0, 1, 2, 1], [0, 1, 1, 1]) == 0.75
    x, y = drawn.normal(size=30), drawn.normal(size=30)
    assert tasks.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert tasks.pearson(x, np.ones(30)) == 0.0
