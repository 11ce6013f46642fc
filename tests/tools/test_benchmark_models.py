"""`peftk bench --suite cpu`: the rows of whole models, each run once at its smallest."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from peftk.ops import custom_ops
from peftk.system import extras
from peftk.tools import minilm
from peftk.tools.benchmark import engines, model, model_train, peak_memory, suite, suite_cases
from peftk.tools.benchmark.common import PEFT, Case, Shape, Side
from peftk.tools.benchmark.suite import NOT_MEASURED, PASS, SHORT, WRONG
from peftk.tools.benchmark.targets import (
    COMPILE,
    MODEL_COMPILED,
    MODEL_MEMORY,
    ONE_BY_ONE,
    PEFTK,
    PLAIN_MODEL,
    WITH_DROPOUT,
    Target,
)

WHERE = {"peftk": "0", "cpu": "some", "torch": "0", "load": None, "cores": 2}
PEFTS_DROPOUT = PEFT + WITH_DROPOUT


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    class Watch:
        def not_run(self):
            return 0.0

    monkeypatch.setattr(suite, "Watch", Watch)


def run(*targets: Target, **options):
    console = Console(width=110, record=True, quiet=True)
    return suite.run(console, suite.Options(seconds=0.001, repeats=1, **options), WHERE, targets)


def shape(op: str, sentences: int = 1, dtype: str = "fp32", adapters: int = 1) -> Shape:
    return Shape(op, dtype, 21 * sentences, 384, 384, 16, adapters)


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
def test_inference(dtype):
    one = shape("model", dtype=dtype)
    outcome = run(Target("", one, PLAIN_MODEL, 1e-6, net=True), Target("", one, PEFT, 1e-6))
    assert outcome.all_correct
    assert [r.mark for r in outcome.results] == [PASS, PASS]
    assert all(r.limit > 0 for r in outcome.results)
    assert "| PEFT |" not in suite.markdown(outcome, WHERE)  # it has rows of its own
    assert outcome.results[0].ratio > outcome.results[0].peer_us / outcome.results[0].median_us  # net


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled(dtype):
    one = shape("model_compiled", dtype=dtype)
    outcome = run(*(Target(MODEL_COMPILED, one, peer, 1e-6) for peer in (PEFTK, COMPILE)))
    assert outcome.all_correct
    assert [(r.side, r.mark) for r in outcome.results] == [(f"{PEFTK} compiled", PASS)] * 2
    (left_out,) = run(Target(MODEL_COMPILED, one, PEFTK, 1.0), compile=False).results
    assert (left_out.mark, left_out.note) == (NOT_MEASURED, "skipped by --no-compile")


@pytest.mark.full
def test_a_compiled_model_is_one_graph_of_direct_ops():
    """A layer that fell back to the op with gradients would make it slower than in eager mode."""
    one = shape("model")
    adapted, ids = minilm.with_lora(model.plain(one), 16, seed=1), model.token_ids(one)
    torch._dynamo.reset()
    with torch.inference_mode():
        explained = torch._dynamo.explain(adapted)(input_ids=ids)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    ops = [node.target for node in explained.graphs[0].graph.nodes]
    assert ops.count(custom_ops.lora_linear_forward) == 36
    assert torch.ops.peftk.lora_linear.default not in ops


def test_engines_that_are_not_installed_are_left_out(monkeypatch):
    installed, absent = extras.is_installed, ("onnxruntime", "openvino")
    monkeypatch.setattr(extras, "is_installed", lambda name: name not in absent and installed(name))
    assert engines.installed(torch.nn.Linear(2, 2), torch.zeros(1, 2)) == {}
    one = shape("model_compiled")
    case = Case(one, (Side(PLAIN_MODEL, int, lambda: 0.0), Side(PEFTK, int, lambda: 0.0)), float("inf"))
    monkeypatch.setattr(suite_cases, "build", lambda shape: suite.Row(case))
    plain, onnx = run(Target("", one, PLAIN_MODEL, 1e-6), Target("", one, engines.ONNX_RUNTIME, 1.0)).results
    assert plain.mark == PASS
    assert (onnx.mark, onnx.note) == (NOT_MEASURED, "ONNX Runtime is not installed: pip install 'peftk[engines]'")


@pytest.mark.parametrize("module", ["onnxruntime", "openvino"])
def test_an_engine_computes_the_plain_model(module):
    for needed in ("onnx", "onnxscript", module):
        pytest.importorskip(needed)
    layer = torch.nn.Embedding(7, 5)
    ids = torch.tensor([[1, 6, 3]])
    for engine in engines.installed(layer, ids).values():
        torch.testing.assert_close(engine(), layer(ids).detach())


def test_training():
    one, many = shape("model_train"), shape("model_train", sentences=2, adapters=2)
    outcome = run(Target("", one, PEFT, 1e-6), Target("", many, ONE_BY_ONE, 1e-6))
    assert outcome.all_correct
    assert [(r.peer, r.side, r.mark) for r in outcome.results] == [(PEFT, PEFTK, PASS), (ONE_BY_ONE, PEFTK, PASS)]


def test_a_wrong_gradient_is_found(monkeypatch):
    monkeypatch.setattr(model_train, "with_peft", lambda adapted, base: minilm.with_lora(base, 16, seed=1))
    monkeypatch.setattr(model_train, "_place", lambda name: name)
    (result,) = run(Target("", shape("model_train"), PEFT, 1.0)).results
    assert result.mark == WRONG
    assert f"{PEFT} is wrong by" in result.note


def test_gradients_that_are_missing_or_far():
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}
    assert model_train._error(expected, expected) == 0.0
    assert model_train._error({**expected, "b": torch.tensor([0.5])}, expected) == pytest.approx(0.1)
    assert model_train._error({"a": expected["a"]}, expected) == float("inf")


def test_peak_of_what_is_allocated():
    kept = []

    def call():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        kept.append(torch.empty(250))
        del second

    assert peak_memory.peak_bytes(call) == 6000
    assert peak_memory.peak_bytes(kept.clear) == 0


def test_memory_of_a_step():
    """What is saved is the same, but for the dropout's masks and the inputs that they made: peftk keeps neither."""
    one = shape("model_memory")
    targets = [Target(MODEL_MEMORY, one, peer, 1.0, at_most=True) for peer in (PEFT, PEFTS_DROPOUT)]
    outcome = run(*targets)
    assert outcome.all_correct
    plain, dropout = outcome.results
    assert (plain.side, dropout.side) == (PEFTK, PEFTK + WITH_DROPOUT)
    for result in (plain, dropout):
        assert (result.mark, result.median_us, result.not_run) == (PASS, None, None)
        assert result.ratio == result.peak_bytes / result.peer_bytes
    assert dropout.ratio < 0.8
    markdown = suite.markdown(outcome, WHERE)
    assert "| peftk, MB |" in markdown
    assert "µs |" not in markdown
    assert run(targets[0]._replace(value=0.1)).results[0].mark == SHORT


@pytest.mark.parametrize("sequences", [2, pytest.param(9, marks=pytest.mark.full)])
def test_decoding(sequences):
    """Every sequence has an adapter of its own; HF PEFT is beside it for up to eight."""
    decode = Shape("decode", "fp32", sequences, 512, 512, 8, sequences)
    peers = [PLAIN_MODEL, PEFT] if sequences <= 8 else [PLAIN_MODEL]
    outcome = run(*(Target("", decode, peer, 1e-6) for peer in peers))
    assert outcome.all_correct
    assert [r.mark for r in outcome.results] == [PASS] * len(peers)
    assert (PEFT in {record.side for record in outcome.records}) == (sequences <= 8)


@pytest.mark.full
def test_a_decoding_step_can_be_repeated():
    decode = Shape("decode", "fp32", 1, 512, 512, 8, 1)
    for side in suite_cases.build(decode).case.sides[:2]:
        first = side.run()
        side.reset()
        assert torch.equal(side.run(), first)
        side.reset()
        side.reset()  # nothing to take back
        assert torch.equal(side.run(), first)
