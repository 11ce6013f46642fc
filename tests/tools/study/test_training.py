"""A run alone and in a mixed batch, what is cached, what is chosen, and that a seed's numbers come again."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from rich.console import Console

import peftk
from peftk.tools.demo.stage import Stage
from peftk.tools.study import training
from peftk.tools.study.classifier import Features
from peftk.tools.study.encoded import Encoded, training_batches
from peftk.tools.study.lab import Lab
from peftk.tools.study.methods import BITFIT, FULL, HEAD, Method, compared
from peftk.tools.study.parts.placement import without
from peftk.tools.study.parts.spectra import directions, intruders
from peftk.tools.study.runs import Run, Store
from peftk.tools.study.sweep import Together
from peftk.tools.study.tasks import DataError
from peftk.tools.study.training import Trainer, alone, injected, rate_factor, tenths
from peftk.tools.study.tuning import rates
from tests.support.small_study import cut_model, with_tasks, write_data

LAYERS = 2


@pytest.fixture
def lab(tmp_path, monkeypatch):
    cut_model(monkeypatch, LAYERS)
    stage = Stage(Console(file=io.StringIO()), quick=True, has_peft=True)
    return Lab(with_tasks("cola"), write_data(tmp_path / "data"), tmp_path / "out", stage)


def trained_for(lab, side, steps=3):
    data = lab.data("cola")
    trainer = Trainer(side, lab.features("cola")["train"], data.train.labels)
    batches = [training_batches(data.train, run.train, run.batch, run.seed) for run in side.runs]
    return [trainer.step([next(each) for each in batches]) for _ in range(steps)]


def test_a_mixed_batch_trains_each_run_as_it_trains_alone(lab):
    methods = Method("lora", 2, "q"), Method("lora", 8, "all"), Method("lora", 4, "qv")
    runs = [lab.run("cola", m, 10 ** (-2 - n), seed=n) for n, m in enumerate(methods)]
    mixed = Together(lab.bert, 2, runs)
    losses = trained_for(lab, mixed)
    for number, run in enumerate(runs):
        one = alone(lab.bert, 2, run)
        assert [each[number] for each in losses] == pytest.approx([loss for (loss,) in trained_for(lab, one)], abs=1e-5)
        ours, theirs = mixed.trained(number), one.trained(0)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(
                value, theirs[name], rtol=1e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
            )
        assert any(bool(value.any()) for name, value in ours.items() if name.endswith("lora_B"))


@pytest.mark.parametrize("method", [HEAD, Method("top", 1)])
def test_layers_that_are_left_out_change_nothing(lab, method):
    run = lab.run("cola", method, 1e-2)
    short, whole = alone(lab.bert, 2, run), training.Alone(injected(lab.minilm.copy(), 2, run), run)
    assert short.first_layer == method.first_layer(LAYERS) > 0
    losses = trained_for(lab, short), trained_for(lab, whole)
    assert [loss for (loss,) in losses[0]] == pytest.approx([loss for (loss,) in losses[1]], abs=1e-5)
    ours, theirs = short.trained(0), whole.trained(0)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("method", compared(LAYERS), ids=lambda method: method.label)
def test_every_method_trains_what_it_names_and_nothing_else(lab, method):
    side = alone(lab.bert, 2, lab.run("cola", method, 1e-2, watched=1))
    before = copy.deepcopy(dict(side.model.named_parameters()))
    trained_for(lab, side, steps=2)
    changed = {name for name, p in side.model.named_parameters() if not torch.equal(p, before[name])}
    named = {name for name, p in side.model.named_parameters() if p.requires_grad}
    assert "classifier.weight" in changed
    assert changed <= named
    assert peftk.count_parameters(side.model).trainable == sum(p.numel() for p in side.parameters(0))


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(lab):
    runs = [lab.run("cola", BITFIT, 1e-2, seed) for seed in (0, 0, 1)]
    results = []
    for run in runs:
        lab.store._found.clear()
        results += lab.results([run])
    assert results[0]["losses"] == results[1]["losses"] != results[2]["losses"]
    assert results[0]["score"] == results[1]["score"]


def test_finished_runs_are_not_trained_again(lab, monkeypatch):
    runs = [lab.run("cola", HEAD, 1e-2), lab.run("cola", Method("lora", 1, "q"), 1e-2)]
    first = lab.results(runs)
    assert (lab.out / "runs.jsonl").read_text().count("\n") == 2
    monkeypatch.setattr(training, "train", None)
    assert lab.results(runs) == first
    assert [Store(lab.out / "runs.jsonl").get(run) for run in runs] == first


def test_a_model_comes_back_from_its_weights_or_is_trained_again(lab):
    run = lab.run("cola", Method("series", 4), 1e-1)
    (record,) = lab.results([run])
    data, features = lab.data("cola"), lab.features("cola")
    for _ in range(2):
        side = training.Alone(lab.trained(run), run)
        assert training.score(side, 0, data, features, "test") == record["score"]
        lab.forget([run])
    with torch.inference_mode():
        batch = data.test.batch([0, 1])
        whole = side.model(**batch)
        with without(side.model, 0, LAYERS - 1):
            nothing = side.model(**batch)
        assert torch.equal(side.model(**batch), whole)
    plain = injected(lab.minilm.copy(), 2, lab.run("cola", HEAD, 1e-1))
    plain.classifier.load_state_dict(side.model.classifier.state_dict())
    torch.testing.assert_close(nothing, plain(**batch))
    assert not torch.allclose(nothing, whole)


def test_a_watched_run_says_what_was_on_the_way(lab):
    (record,) = lab.results([lab.run("cola", FULL, 1e-3, watched=2)])
    assert [each["step"] for each in record["trace"]] == [0, 2, 3]
    assert record["trace"][-1]["target"] == record["score"]
    sources = [each["source"] for each in record["trace"]]
    assert len({*sources}) == 3
    assert all(-1 <= source <= 1 for source in sources)


def test_a_learning_rate_is_the_best_of_the_grid_on_held_out_data(lab):
    found = rates(lab, "cola", [HEAD, BITFIT, Method("bitfit", where="qkv"), Method("top", 1)])
    for method, chosen in found.items():
        tried = method.rates[-lab.settings.rates :]
        assert [each["rate"] for each in chosen["grid"]] == list(tried)
        best = max(each["held_out"] for each in chosen["grid"])
        assert best == next(each["held_out"] for each in chosen["grid"] if each["rate"] == chosen["rate"])
    assert found[Method("bitfit", where="qkv")]["of"] == BITFIT.label


def test_held_out_sentences_are_in_no_batch(lab):
    data = lab.data("cola")
    assert len(data.train) == 24
    assert len(data.held_out) == 8
    drawn = itertools.islice(training_batches(data.train, 8, 4, 0), 20)
    assert {row for rows in drawn for row in rows} == set(range(8))  # a smaller training set is its beginning


def test_batches_come_again_and_step_by_step_of_about_one_length():
    lengths = [3 + (7 * n) % 40 for n in range(200)]
    data = Encoded([[1] * length for length in lengths], [[0] * length for length in lengths], [0.0] * 200)
    epochs = {seed: list(itertools.islice(training_batches(data, 200, 10, seed), 40)) for seed in (0, 1)}
    assert epochs[0] == list(itertools.islice(training_batches(data, 200, 10, 0), 40))
    assert epochs[0] != epochs[1]
    assert sorted(row for rows in epochs[0][:20] for row in rows) == list(range(200))
    apart = [
        abs(max(lengths[r] for r in a) - max(lengths[r] for r in b)) for a, b in zip(*epochs.values(), strict=True)
    ]
    assert sum(apart) / len(apart) < 8  # of 40


def test_features_are_the_hidden_states(lab):
    data = lab.data("cola").train
    batch = data.batch([3, 0])
    with torch.inference_mode():
        hidden = lab.bert(**batch, output_hidden_states=True).hidden_states[1]
    found = Features(lab.bert, data).batch([3, 0], 1)
    mask = batch["attention_mask"].unsqueeze(-1)
    torch.testing.assert_close(found["inputs_embeds"] * mask, hidden * mask)


def test_the_learning_rate_rises_and_falls_to_nothing():
    factors = [rate_factor(step, 20) for step in range(20)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.06
    assert tenths([float(n) for n in range(20)]) == [0.5 + 2 * n for n in range(10)]


def test_an_unfinished_line_is_dropped_and_another_file_refused(tmp_path):
    file = tmp_path / "runs.jsonl"
    run = Run("cola", HEAD, 0.1, 0, 1, 1, 1, 1, 1, 1)
    Store(file).add([run], [{"score": 0.5}])
    whole = file.read_text()
    file.write_text(whole + whole[:20])
    store = Store(file)
    assert len(store) == 1
    assert store.get(run)["score"] == 0.5
    assert file.read_text() == whole
    file.write_text('{"other": 1}\n')
    with pytest.raises(DataError, match=r"runs.jsonl, line 1: expected a finished run"):
        Store(file)


def test_directions_and_intruders():
    assert directions(torch.tensor([4.0, 1.0, 0.1])) == 1
    assert directions(torch.tensor([1.0, 1.0, 1.0])) == 3
    assert directions(torch.zeros(3)) == 0
    U = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    before = U[:, :16]
    assert intruders(before, before) == 0
    after = torch.cat([U[:, 20:23], before], 1)  # three that W₀ does not have
    assert intruders(before, after) == 3
