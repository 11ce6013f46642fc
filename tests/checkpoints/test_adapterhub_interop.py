"""Tests of AdapterHub's checkpoints: files of the adapters library (tests/fixtures/adapterhub), and ours read by it.

The library needs an older transformers than the rest of the tests, so its outputs lie in the fixtures; where it is
installed, `test_the_library_reads_what_we_write` runs it (see tests/fixtures/write_adapterhub.py).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftk
from peftk.methods.plan import injections
from tests.support.paths import ROOT

transformers = pytest.importorskip("transformers")

FIXTURES = ROOT / "tests" / "fixtures" / "adapterhub"
ARCHITECTURES = sorted(folder.name for folder in FIXTURES.iterdir())
CHECKPOINTS = sorted(str(file.parent.relative_to(FIXTURES)) for file in FIXTURES.glob("*/*/adapter.safetensors"))
# one of each placement, site and kind of config; the others in the exhaustive run
SAMPLE = (
    *("bert/after_ln", "bert/houlsby", "bert/mapping", "bert/parallel_both", "bert/pfeiffer", "gpt2/after_ln"),
    *("gpt2/parallel_both", "llama/mapping", "roberta/pfeiffer", "t5/cross", "t5/parallel_both", "t5/pfeiffer"),
)
SAMPLED = [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.full) for name in CHECKPOINTS]
WITHOUT_LIBRARY = importlib.util.find_spec("adapters") is None


def model(architecture: str) -> nn.Module:
    return copy.deepcopy(_model(architecture))


@functools.cache
def _model(architecture: str) -> nn.Module:
    about = json.loads((FIXTURES / architecture / "model.json").read_text())
    kind = getattr(transformers, about["class"])
    made: nn.Module = kind(kind.config_class(**about["config"])).eval()
    loaded = made.load_state_dict(load_file(FIXTURES / architecture / "model.safetensors"), strict=False)
    assert not loaded.unexpected_keys
    parameters = {name for name, _ in made.named_parameters()}
    assert not parameters & set(loaded.missing_keys)
    return made


def recorded(architecture: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / architecture / "outputs.safetensors")


def output(model: nn.Module, record: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: record[name] for name in ("input_ids", "attention_mask", "decoder_input_ids") if name in record}
    with torch.inference_mode():
        return model(**inputs)[0]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    # whole models in fp32, with sums in a different order, by a different version of transformers on another machine
    torch.testing.assert_close(one, other, atol=5e-6, rtol=5e-6)


def test_the_fixtures_are_complete() -> None:
    assert ARCHITECTURES == ["bert", "gpt2", "llama", "roberta", "t5"]
    assert len(CHECKPOINTS) == 31
    assert set(SAMPLE) < set(CHECKPOINTS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_base_models_are_the_librarys(architecture: str) -> None:
    record = recorded(architecture)
    close(output(model(architecture), record), record["base"])


@pytest.mark.parametrize("checkpoint", SAMPLED)
def test_outputs_are_the_librarys(tmp_path: pathlib.Path, checkpoint: str) -> None:
    architecture, name = checkpoint.split("/")
    record, ours = recorded(architecture), model(architecture)
    peftk.load_adapter(ours, FIXTURES / checkpoint)
    assert not torch.allclose(output(ours, record), record["base"], atol=1e-2)
    close(output(ours, record), record[name])
    theirs = load_file(FIXTURES / checkpoint / "adapter.safetensors")
    assert peftk.count_parameters(ours).trainable == sum(tensor.numel() for tensor in theirs.values())

    peftk.save_adapter(ours, tmp_path / "adapterhub", format="adapterhub")
    saved = load_file(tmp_path / "adapterhub" / "adapter.safetensors")
    assert {key.replace(".default.", f".{name}.") for key in saved} == theirs.keys()
    for key, tensor in saved.items():  # β = s·b and back again: exact, since these s are powers of 2
        assert torch.equal(tensor, theirs[key.replace(".default.", f".{name}.")])
    peftk.save_adapter(ours, tmp_path / "peftk")
    injected, plain = model(architecture), model(architecture)
    peftk.inject(injected, injections(ours)[0].config)
    close(output(injected, record), record["base"])
    expected = output(ours, record)
    for other, folder in ((injected, "adapterhub"), (injected, "peftk"), (plain, "adapterhub")):
        peftk.load_adapter(other, tmp_path / folder)
        assert torch.equal(output(other, record), expected)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("bert", peftk.SeriesAdapterConfig(bottleneck=5, activation="gelu", leave_out=[0])),
        ("bert", peftk.ParallelAdapterConfig(reduction_factor=3.5, where=("attention", "mlp"))),
        ("gpt2", peftk.SeriesAdapterConfig(reduction_factor=2, where=["mlp"])),
        ("llama", peftk.SeriesAdapterConfig(bottleneck=3, scaling=0.5)),
        ("t5", peftk.SeriesAdapterConfig(bottleneck=3)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_series_and_parallel_adapters_where_adapterhub_has_them(
    tmp_path: pathlib.Path, architecture: str, config: Any
) -> None:
    record, ours = recorded(architecture), model(architecture)
    peftk.inject(ours, config)
    randomise_trained(ours)
    peftk.save_adapter(ours, tmp_path, format="adapterhub")
    injected, plain = model(architecture), model(architecture)
    peftk.inject(injected, config)
    for other in (injected, plain):
        peftk.load_adapter(other, tmp_path)
        close(output(other, record), output(ours, record))
    assert not torch.allclose(output(plain, record), record["base"], atol=1e-3)


def randomise_trained(model: nn.Module) -> None:
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.2)


@pytest.mark.parametrize(
    ("architecture", "configs", "message"),
    [
        ("gpt2", [peftk.ParallelAdapterConfig(bottleneck=2)], "got one after a LayerNorm"),
        ("bert", [peftk.SeriesAdapterConfig(bottleneck=2, where=["pooler"])], "where: expected attention and mlp"),
        ("bert", [peftk.LoraConfig(target_modules=["query"])], "expected bottleneck adapters, got LoraConfig"),
        (
            "bert",
            [peftk.LoraConfig(target_modules=["query"]), peftk.SeriesAdapterConfig(bottleneck=2)],
            "expected one method, got LoraConfig, SeriesAdapterConfig",
        ),
        ("bert", [peftk.AdapterHubConfig(scaling=0.0)], "scaling: expected a number other than 0"),
    ],
)
def test_adapters_that_adapterhub_cannot_hold_are_not_saved(
    tmp_path: pathlib.Path, architecture: str, configs: Any, message: str
) -> None:
    ours = model(architecture)
    peftk.inject(ours, configs)
    with pytest.raises(ValueError, match=message):
        peftk.save_adapter(ours, tmp_path, format="adapterhub")
    assert list(tmp_path.iterdir()) == []


def _config(**fields: Any) -> Callable[..., None]:
    return lambda weights, config: config["config"].update(fields)


def _outer(**fields: Any) -> Callable[..., None]:
    return lambda weights, config: config.update(fields)


def _weight(part: str, value: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[..., None]:
    def change(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        key = next(key for key in weights if part in key)
        found = value(weights.pop(key))
        if found is not None:
            weights[key] = found.contiguous()

    return change


SPOILT: dict[str, tuple[Callable[..., None], str]] = {
    "learned scaling": (_config(scaling="learned"), "expected scaling to be a number, got 'learned'"),
    "no scaling": (_config(scaling=float("inf")), "scaling: expected"),
    "its own norm before": (_config(ln_before=True), "got ln_before=True"),
    "its own norm after": (_config(ln_after=True), "got ln_after=True"),
    "gate": (_config(use_gating=True), "got use_gating=True"),
    "phm": (_config(phm_layer=True), "got phm_layer=True"),
    "invertible": (_config(inv_adapter="nice"), "got inv_adapter='nice'"),
    "dropout": (_config(dropout=0.1), "got dropout=0.1"),
    "stochastic depth": (_config(stochastic_depth=0.1), "got stochastic_depth=0.1"),
    "a field of tomorrow": (_config(use_something=1), "got use_something=1"),
    "prefix tuning": (_config(architecture="prefix_tuning"), "got architecture 'prefix_tuning'"),
    "lora": (_config(architecture="lora"), "got architecture 'lora'"),
    "union": (_config(architecture="union"), "got architecture 'union'"),
    "another activation": (_config(non_linearity="leakyrelu"), "expected non_linearity one of"),
    "an activation of another kind": (_config(non_linearity=None), "expected non_linearity to be a name"),
    "a mapping without a default": (_config(reduction_factor={"7": 2}), "one for layer 0 or a default"),
    "a factor of 0": (_config(reduction_factor=0), "reduction_factor: expected a number above 0"),
    "another factor": (_config(reduction_factor=2), r"expected torch.float32 \[8\], got torch.float32 \[4\]"),
    "a layer that is not there": (_config(leave_out=[0, 1]), "leave_out: expected some site to remain"),
    "a layer more to leave out": (_config(leave_out=[1]), "in exactly the model's places"),
    "no skip": (_config(original_ln_after=False), "a placement that keeps the model's own skip exactly once"),
    "two skips": (_config(original_ln_before=True, residual_before_ln=False), "own skip exactly once"),
    "post add": (_config(original_ln_before=True, residual_before_ln="post_add"), "own skip exactly once"),
    "other places": (_config(mh_adapter=False), "in exactly the model's places"),
    "no places": (_config(mh_adapter=False, output_adapter=False), "expected at least one of mh_adapter"),
    "no config": (_outer(config=None), "expected config to be the fields of a BnConfig"),
    "an empty config": (_outer(config={}), "got none of mh_adapter"),
    "another name": (_outer(name="other"), r"<module>.adapters.other.adapter_"),
    "an odd name": (_outer(name="../houlsby"), "expected name to be an adapter's name"),
    "no name": (_outer(name=None), "expected name to be an adapter's name"),
    "a part is missing": (_weight("adapter_up.bias", lambda t: None), "expected adapter_up.bias"),
    "another width": (_weight("adapter_up.weight", lambda t: t[1:]), r"expected down \[R, d\]"),
    "nan": (_weight("adapter_down", lambda t: t * torch.nan), "expected finite values"),
    "integers": (_weight("adapter_down", lambda t: t.long()), "expected fp32, bf16, fp16 or fp64, got torch.int64"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: pathlib.Path, how: str) -> None:
    weights = load_file(FIXTURES / "bert" / "houlsby" / "adapter.safetensors")
    config = json.loads((FIXTURES / "bert" / "houlsby" / "adapter_config.json").read_text())
    spoil, message = SPOILT[how]
    spoil(weights, config)
    save_file(weights, tmp_path / "adapter.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours, record = model("bert"), recorded("bert")
    names = [name for name, _ in ours.named_modules()]
    with pytest.raises(peftk.CheckpointError, match=message):
        peftk.load_adapter(ours, tmp_path)
    assert [name for name, _ in ours.named_modules()] == names
    assert injections(ours) == ()
    assert all(parameter.requires_grad for parameter in ours.parameters())
    close(output(ours, record), record["base"])


def test_an_injected_model_takes_only_the_same_kind(tmp_path: pathlib.Path) -> None:
    ours = model("bert")
    peftk.load_adapter(ours, FIXTURES / "bert" / "houlsby")
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    for name, message in (
        ("parallel", "expected the model's placement, 'series', got 'parallel'"),
        ("mapping", "expected the model's activation, 'silu', got 'gelu_tanh'"),
    ):
        with pytest.raises(peftk.CheckpointError, match=message):
            peftk.load_adapter(ours, FIXTURES / "bert" / name)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    lora = model("bert")
    peftk.inject(lora, peftk.LoraConfig(target_modules=["query"]))
    with pytest.raises(peftk.CheckpointError, match="a model with only bottleneck adapters"):
        peftk.load_adapter(lora, FIXTURES / "bert" / "houlsby")
    with pytest.raises(peftk.CheckpointError, match=r"fits the model.*known family"):
        peftk.load_adapter(nn.Sequential(nn.Linear(16, 16)), FIXTURES / "bert" / "houlsby")


def test_a_load_that_fails_half_way_does_not_change_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, record = model("t5"), recorded("t5")
    names = [name for name, _ in ours.named_modules()]
    copy_, calls = torch.Tensor.copy_, []

    def failing(self: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(self)
        if len(calls) == 5:
            raise MemoryError
        return copy_(self, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(MemoryError):
        peftk.load_adapter(ours, FIXTURES / "t5" / "cross")
    monkeypatch.undo()
    assert [name for name, _ in ours.named_modules()] == names
    assert torch.equal(output(ours, record), output(model("t5"), record))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.modules())


def test_a_model_with_a_head_and_its_base_model_share_checkpoints() -> None:
    headed, base = model("roberta"), model("roberta").roberta
    record = recorded("roberta")
    peftk.load_adapter(headed, FIXTURES / "roberta" / "pfeiffer")
    peftk.load_adapter(base, FIXTURES / "roberta" / "pfeiffer")  # keys begin with "roberta."
    inputs = {name: record[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(base(**inputs)[0], headed.roberta(**inputs)[0])


def test_gelu_of_old_versions_is_the_tanh_form(tmp_path: pathlib.Path) -> None:
    for name in ("adapter.safetensors", "adapter_config.json"):
        shutil.copy(FIXTURES / "bert" / "after_ln" / name, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["version"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours = model("bert")
    peftk.load_adapter(ours, tmp_path)
    assert {m.activation for m in ours.modules() if isinstance(m, peftk.nn.SeriesAdapter)} == {"gelu_tanh"}


def test_every_truncation_is_refused(tmp_path: pathlib.Path) -> None:
    files = {
        name: (FIXTURES / "bert" / "pfeiffer" / name).read_bytes()
        for name in ("adapter.safetensors", "adapter_config.json")
    }
    for name, data in files.items():
        for length in sorted({*range(12), *range(12, len(data), 53), len(data) - 1}):
            for file, whole in files.items():
                (tmp_path / file).write_bytes(data[:length] if file == name else whole)
            with pytest.raises(peftk.CheckpointError):
                peftk.load_adapter(nn.Linear(2, 2), tmp_path)


def test_pickled_weights_are_not_read(tmp_path: pathlib.Path) -> None:
    shutil.copy(FIXTURES / "bert" / "houlsby" / "adapter_config.json", tmp_path)
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(peftk.CheckpointError, match=r"got pytorch_adapter.bin there \(pickled files are not read"):
        peftk.load_adapter(model("bert"), tmp_path)


@pytest.mark.skipif(WITHOUT_LIBRARY, reason="the adapters library needs an environment of its own")
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_library_reads_what_we_write(tmp_path: pathlib.Path, checkpoint: str) -> None:
    import adapters

    architecture, name = checkpoint.split("/")
    ours, record = model(architecture), recorded(architecture)
    peftk.load_adapter(ours, FIXTURES / checkpoint)
    for adapter in [m for m in ours.modules() if hasattr(m, "bias_B")]:
        for parameter in (adapter.lora_A, adapter.lora_B, adapter.bias_A, adapter.bias_B):
            parameter.data.mul_(0.7)
    peftk.save_adapter(ours, tmp_path, format="adapterhub")
    theirs = model(architecture)
    adapters.init(theirs)
    loaded: dict[str, Any] = {}
    theirs.load_adapter(str(tmp_path), use_safetensors=True, set_active=True, loading_info=loaded)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    close(output(theirs.eval(), record), output(ours, record))
    assert not torch.allclose(output(ours, record), record[name], atol=1e-3)
