"""Tests of peftk's own checkpoints, for all methods and mixtures of them, and of the choice of format."""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftk
from peftk.checkpoints import files
from peftk.methods.plan import injections

transformers = pytest.importorskip("transformers")


def make(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    if architecture == "bert":
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40
        )
        return transformers.BertForSequenceClassification(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        vocab_size=40,
    )
    return transformers.LlamaForCausalLM(config).eval()


MODELS = {architecture: make(architecture) for architecture in ("bert", "llama")}
LORA = peftk.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
SERIES = peftk.SeriesAdapterConfig(reduction_factor=4, leave_out=(0,), adapter_dtype=torch.bfloat16)
METHODS: dict[str, tuple[str, Any]] = {
    "series": ("bert", SERIES),
    "parallel": ("llama", peftk.ParallelAdapterConfig(bottleneck=3, where=["down_proj", "self_attn"])),
    "bitfit": ("bert", peftk.BitFitConfig(biases=["query", "output.dense"])),
    "llama_adapter": ("llama", peftk.LlamaAdapterConfig(adapter_len=3, adapter_layers=1)),
    "head": ("bert", peftk.HeadConfig()),
    "top": ("bert", peftk.TopLayersConfig(1)),
    "full": ("bert", peftk.FullConfig()),
    "adapterhub": ("bert", peftk.AdapterHubConfig(reduction_factor={"0": 4, "default": 8}, placement="before_norm")),
    "lora and series": ("bert", [LORA, SERIES]),
    "two loras": (
        "llama",
        [
            peftk.LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
            peftk.LoraConfig(r=3, target_modules=["v_proj"]),
        ],
    ),
}


def plain(architecture: str) -> nn.Module:
    return copy.deepcopy(MODELS[architecture])


def output(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        return model(input_ids=torch.randint(0, 40, (2, 5))).logits


def trained(name: str) -> nn.Module:
    architecture, configs = METHODS[name]
    model = plain(architecture)
    peftk.inject(model, configs)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.5)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_every_method_round_trips(tmp_path: pathlib.Path, name: str) -> None:
    model = trained(name)
    peftk.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert files.checkpoint_format(config) == "peftk"
    weights = load_file(tmp_path / "adapter_model.safetensors")
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[n], own[n]) for n in own)
    architecture, configs = METHODS[name]
    injected, without = plain(architecture), plain(architecture)
    peftk.inject(injected, configs)
    assert torch.allclose(output(injected), output(without), atol=1e-6)
    for other in (injected, without):
        assert not torch.allclose(output(other), output(model), atol=1e-3)
        peftk.load_adapter(other, tmp_path)
        assert torch.equal(output(other), output(model))
        assert peftk.count_parameters(other) == peftk.count_parameters(model)
        assert [r.layers + r.attached + r.trained for r in injections(other)] == [
            r.layers + r.attached + r.trained for r in injections(model)
        ]


def test_fields_of_any_form_are_saved(tmp_path: pathlib.Path) -> None:
    configs = [
        peftk.LoraConfig(
            r=np.int64(2),
            target_modules={"value", "query"},
            layers_to_transform={1: None}.keys(),
            alpha_pattern={"query": np.float32(3)},
        ),
        peftk.SeriesAdapterConfig(4, where=frozenset(["mlp", "attention"]), leave_out=range(1)),
    ]
    model, other = plain("bert"), plain("bert")
    peftk.inject(model, configs)
    peftk.save_adapter(model, tmp_path)
    peftk.load_adapter(other, tmp_path)
    assert [record.config for record in injections(other)] == configs
    assert [record.layers for record in injections(other)] == [record.layers for record in injections(model)]


def test_scalings_from_a_checkpoint_are_saved(tmp_path: pathlib.Path) -> None:
    one, other = plain("llama"), plain("llama")
    peftk.inject(one, peftk.LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj"], use_rslora=True))
    peftk.save_adapter(one, tmp_path / "peft")
    peftk.inject(other, peftk.LoraConfig(r=2, target_modules=["q_proj"]))
    peftk.load_adapter(other, tmp_path / "peft")
    peftk.save_adapter(other, tmp_path / "own", format="peftk")
    last = plain("llama")
    peftk.load_adapter(last, tmp_path / "own")
    for model in (other, last):
        layers = [m for m in model.modules() if isinstance(m, peftk.LoRALinear)]
        assert {(layer.lora_alpha, layer.use_rslora) for layer in layers} == {(7.0, True)}


def test_only_lora_is_saved_in_pefts_format(tmp_path: pathlib.Path) -> None:
    model = plain("bert")
    peftk.inject(model, LORA)
    peftk.save_adapter(model, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    for name, reason in (
        ("series", "got SeriesAdapterConfig"),
        ("lora and series", "got SeriesAdapterConfig"),
        ("two loras", "bias all and none at once"),
        ("bitfit", "got BitFitConfig"),
    ):
        with pytest.raises(
            ValueError, match=f"LoRA checkpoint of HF PEFT can hold, got.*{reason.removeprefix('got ')}"
        ):
            peftk.save_adapter(trained(name), tmp_path / "no", format="peft")
    with pytest.raises(ValueError, match="format: expected one of peft, adapterhub, peftk or None, got 'pickle'"):
        peftk.save_adapter(model, tmp_path / "no", format="pickle")
    with pytest.raises(ValueError, match="model: expected LoRALinear layers or other adapters"):
        peftk.save_adapter(plain("bert"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_lora_linear_put_in_by_hand_is_saved(tmp_path: pathlib.Path) -> None:
    def by_hand() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(peftk.LoRALinear.from_linear(nn.Linear(4, 4), r=2, lora_bias=True), nn.Linear(4, 2))

    one, other = by_hand(), by_hand()
    for parameter in (one[0].lora_A, one[0].lora_B, one[0].lora_bias):
        nn.init.normal_(parameter)
    peftk.save_adapter(one, tmp_path)
    peftk.load_adapter(other, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(one(x), other(x))
    one[0].merge()
    torch.testing.assert_close(one(x), other(x))
    with pytest.raises(ValueError, match="expected 0 to be unmerged"):
        peftk.load_adapter(one, tmp_path)


def test_lora_bias_trains_and_is_the_identity_at_first() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    layer = peftk.LoRALinear.from_linear(copy.deepcopy(linear), r=2, lora_alpha=6, lora_bias=True)
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), linear(x))
    layer(x).sum().backward()
    torch.testing.assert_close(layer.lora_bias.grad, torch.full((3,), 3.0 * 5))  # s · the number of rows
    assert peftk.count_parameters(layer).trainable == 2 * 4 + 3 * 2 + 3


def _json(**fields: Any) -> Callable[..., None]:
    return lambda weights, config: config.update(fields)


def _method(**fields: Any) -> Callable[..., None]:
    return lambda weights, config: config["methods"][0].update(fields)


def _drop(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del weights[next(iter(weights))]


def _reshape(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    key = next(iter(weights))
    weights[key] = weights[key][:-1].contiguous()


def _overflow(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    key = next(key for key in weights if "lora_A" in key)
    weights[key] = torch.full_like(weights[key], 1e300, dtype=torch.float64)


SPOILT: dict[str, tuple[Callable[..., None], str]] = {
    "another version": (_json(peftk=2), "expected peftk 1, got 2"),
    "no methods": (_json(methods=[]), "what the model trains; unknown: bert.encoder"),
    "methods of another kind": (_json(methods="LoraConfig"), "expected methods to be a list of configs"),
    "another method": (_method(method="os.system"), "expected a method of AdapterHubConfig.*got 'os.system'"),
    "a field more": (_method(hidden=1), "expected fields of LoraConfig, got hidden"),
    "a bad field": (_method(r=0), "LoraConfig: r: expected an integer of 1 or more"),
    "a bad dtype": (_method(adapter_dtype="int8"), "LoraConfig: adapter_dtype: expected one of float32.*got .int8."),
    "other targets": (_method(target_modules=["nowhere"]), "fits the model"),
    "another rank": (_method(r=3), r"expected rank 3 of adapter_config.json, got lora_A \[2, 16\]"),
    "a tensor is missing": (_drop, "tensors for exactly what the model trains; missing"),
    "a tensor more": (lambda w, c: w.update(x=torch.ones(1)), "what the model trains; unknown: x$"),
    "another shape": (_reshape, r"expected rank 2 of adapter_config.json, got lora_A \[1, 16\]"),
    "values that are too large": (
        _overflow,
        r"values that torch.float32 can hold, of at most 3.4e\+38, got 1e\+300",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: pathlib.Path, how: str) -> None:
    peftk.save_adapter(trained("lora and series"), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    spoil, message = SPOILT[how]
    spoil(weights, config)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = plain("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(peftk.CheckpointError, match=message):
        peftk.load_adapter(model, tmp_path)
    assert injections(model) == ()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in MODELS["bert"].named_modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_checkpoint_of_a_different_method_does_not_fit(tmp_path: pathlib.Path) -> None:
    peftk.save_adapter(trained("series"), tmp_path)
    model = plain("bert")
    peftk.inject(model, peftk.BitFitConfig())
    with pytest.raises(peftk.CheckpointError, match="the model's methods, BitFitConfig, got SeriesAdapterConfig"):
        peftk.load_adapter(model, tmp_path)
    other = plain("bert")
    peftk.inject(other, peftk.SeriesAdapterConfig(reduction_factor=4, leave_out=(0,), activation="gelu"))
    with pytest.raises(peftk.CheckpointError, match=r"activation='gelu'.*got.*activation='relu'"):
        peftk.load_adapter(other, tmp_path)


def test_every_truncation_is_refused(tmp_path: pathlib.Path) -> None:
    peftk.save_adapter(trained("series"), tmp_path)
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = plain("bert")
    for name, data in whole.items():
        for length in sorted({*range(9), *range(9, len(data), 131), len(data) - 2}):
            (tmp_path / name).write_bytes(data[:length])
            with pytest.raises(peftk.CheckpointError):
                peftk.load_adapter(model, tmp_path)
        (tmp_path / name).write_bytes(data)
    peftk.load_adapter(model, tmp_path)


def test_configs_of_three_libraries_are_distinguished() -> None:
    assert files.checkpoint_format({"peft_type": "IA3", "config": {}, "model_type": "bert"}) == "peft"
    assert files.checkpoint_format({"config": {}, "model_type": "bert", "name": "x"}) == "adapterhub"
    assert files.checkpoint_format({"peftk": 1, "methods": []}) == "peftk"
    for other in ({}, {"config": {}}, {"model_type": "bert"}):
        with pytest.raises(peftk.CheckpointError, match="expected a config of HF PEFT"):
            files.checkpoint_format(other)


class _OneBias(nn.Module):
    """Two linears that share a bias, like BertForMaskedLM's decoder and the module around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_shared_bias_loads_from_peft(tmp_path: pathlib.Path, bias: str) -> None:
    """PEFT writes it under both names."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["a"], bias=bias, init_lora_weights=False)
    theirs, x = peft.get_peft_model(_OneBias(), config), torch.randn(4, 6)
    with torch.no_grad():
        theirs.base_model.model.b.bias.add_(1)
    theirs.save_pretrained(tmp_path)
    ours, served = _OneBias(), _OneBias()
    peftk.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.a.bias is ours.b.bias
    if bias == "all":
        server = peftk.MultiAdapter(served)
        server.load("one", tmp_path)
        with server.route(["one"] * 4):
            torch.testing.assert_close(served(x), theirs(x))
    peftk.save_adapter(ours, tmp_path / "back", format="peft")
    back = peft.PeftModel.from_pretrained(_OneBias(), tmp_path / "back")
    torch.testing.assert_close(back(x), theirs(x))


@pytest.mark.parametrize("format", ["peft", "peftk"])
@pytest.mark.parametrize("bias", ["all", "lora_only", "none"])
def test_saved_while_merged(tmp_path: pathlib.Path, format: str, bias: str) -> None:
    """While merged, the bias contains lora_bias, which must not be saved as a part of a trained bias."""
    model, x = _OneBias(), torch.randn(4, 6)
    model.b.bias = nn.Parameter(torch.randn(6))
    base = copy.deepcopy(model)
    peftk.inject(model, peftk.LoraConfig(r=2, target_modules=["a"], lora_bias=True, bias=bias))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    y = model(x)
    with peftk.merged(model):
        peftk.save_adapter(model, tmp_path, format=format)
    peftk.load_adapter(base, tmp_path)
    torch.testing.assert_close(base(x), y)
    assert torch.equal(base.a.bias, model.a.bias)


def test_switched_to_a_checkpoint_with_lora_bias(tmp_path: pathlib.Path) -> None:
    models = [_OneBias() for _ in range(2)]
    for seed, model in enumerate(models):
        model.b.bias = nn.Parameter(torch.zeros(6))
        peftk.inject(model, peftk.LoraConfig(r=2 + seed, target_modules=["a"], lora_bias=True))
        torch.manual_seed(seed)
        nn.init.normal_(model.a.lora_B)
        nn.init.normal_(model.a.lora_bias)
    x = torch.randn(4, 6)
    peftk.save_adapter(models[1], tmp_path)
    peftk.switch_adapter(models[0], tmp_path)
    torch.testing.assert_close(models[0](x), models[1](x))
    peftk.unmerge_adapter(models[0])
    torch.testing.assert_close(models[0](x), models[1](x))
    assert torch.equal(models[0].a.weight, models[1].a.weight)
