"""The contract with transformers: the private names that peftk.serve uses, and what happens when one changes."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("transformers", "5.24", reason="the engine is for transformers 5.24")

import transformers
from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner

from peftk.serve import continuous
from tests.support import served_llama


def test_transformers_has_the_names_that_the_engine_uses():
    changed = continuous.changed_names()
    assert changed == [], f"transformers {transformers.__version__} has changed {', '.join(changed)}"


def test_the_public_calls_have_the_arguments_that_the_engine_passes():
    manager = continuous_api.ContinuousBatchingManager
    needed = {
        "add_request": ("input_ids", "request_id", "max_new_tokens", "streaming", "eos_token_id"),
        "get_result": ("timeout",),
        "cancel_request": ("request_id",),
        "stop": ("block", "hard_stop"),
        "warmup": (),
        "start": (),
        "is_running": (),
    }
    for method, arguments in needed.items():
        assert set(arguments) <= inspect.signature(getattr(manager, method)).parameters.keys(), method
    options = inspect.signature(transformers.ContinuousBatchingConfig).parameters.keys()
    assert {"page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch", "allow_block_sharing"} <= options


@pytest.mark.parametrize(
    ("owner", "name", "reported"),
    [
        (continuous_api.ContinuousBatchingManager, "_generation_step", "_generation_step"),
        (model_runner.ModelRunner, "_sample", "_sample"),
    ],
)
def test_a_change_is_named_with_the_version(monkeypatch, owner, name, reported):
    monkeypatch.setattr(owner, name, lambda self, other: None)
    with pytest.raises(ImportError, match=rf"got {transformers.__version__}, which has changed \w+\.{reported}"):
        continuous.ContinuousBatching(served_llama.model(), continuous.Sizes(64, 16, 2), None, None)


def test_a_lost_attribute_is_named(monkeypatch):
    class Other:
        def __init__(self) -> None:
            self.batch = []

    monkeypatch.setattr(input_outputs, "ContinuousBatchingIOs", Other)
    assert continuous.changed_names() == [n for n in continuous.PRIVATE if n.startswith("ContinuousBatchingIOs.")]


def test_nothing_else_touches_transformers_private_names():
    """One file knows them."""
    from peftk.serve import adapter_store, engine, generation, packed_attention, sampling, text

    for module in (adapter_store, engine, generation, packed_attention, sampling, text):
        assert "continuous_batching." not in inspect.getsource(module)
