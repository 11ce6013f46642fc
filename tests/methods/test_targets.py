"""Tests that a config selects the same modules as HF PEFT's rule, over names of several model families."""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

import peftk
from peftk.methods import fields
from peftk.methods.targets import (
    idle_keys,
    inside,
    layer_number,
    matches,
    pattern_value,
    target_linears,
    target_modules,
)

NAMES = [
    "embeddings.word",
    "encoder.layer.0.attention.self.query",
    "encoder.layer.11.attention.self.query",
    "encoder.layer.1.output.dense",
    "model.layers.3.mlp.experts.7.down_proj",
    "decoder.block.2.layer.0.SelfAttention.q",
    "transformer.h.10.attn.c_attn",
    "classifier",
    "classifier.dense",
    "my_head.out",
]


def model_of(names: list[str]) -> nn.Module:
    """A model with a linear under each name; linears may contain others."""
    model = nn.Module()
    for name in sorted(names, key=len):
        owner = model
        *parents, child = name.split(".")
        for step in parents:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner._modules[step]
        owner.add_module(child, nn.Linear(2, 2))
    return model


LISTS = [["query", "c_attn", "q"], ["dense"], ["classifier", "out"]]
LAYERS = [(None, None), (1, None), ([0, 3, 10], None), ([3, 10], ["layers", "h"]), ([1, 11], "layer")]


@pytest.mark.parametrize(
    ("targets", "layers", "pattern"),
    [
        *((targets, *layers) for targets, layers in itertools.product(LISTS, LAYERS)),
        (r".*\.(query|q_proj|down_proj)", None, None),
        ("classifier.*", None, None),
    ],
)
@pytest.mark.parametrize("exclude", [None, ["layer.11.attention.self.query"], r".*output.*"])
@pytest.mark.parametrize("saved", [None, ["classifier"]])
def test_as_peft(targets: object, layers: object, pattern: object, exclude: object, saved: object) -> None:
    config = PeftConfig(
        target_modules=targets,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=pattern,
        modules_to_save=saved,
    )
    # PEFT returns a match, or True; for an excluded module, an object of a special class that is also true
    expected = [
        n for n in NAMES if isinstance(found := check_target_module_exists(config, n), re.Match) or found is True
    ]
    arguments = {
        "exclude_modules": exclude,
        "layers_to_transform": [layers] if isinstance(layers, int) else layers,
        "layers_pattern": pattern,
        "modules_to_save": saved or (),
    }
    none = pytest.raises(ValueError, match="target_modules: expected to match")
    with contextlib.nullcontext() if expected else none:
        assert set(target_linears(model_of(NAMES), targets, **arguments).linears) == set(expected)


@pytest.mark.parametrize(
    ("module", "pattern", "number"),
    [
        ("layers.1.q", None, 1),
        ("model.layers.3.experts.7.down", None, 3),
        ("model.layers.3.experts.7.down", "experts", 7),
        ("model.layers.3.experts.7.down", ["nonesuch", "layers"], 3),
        ("model.norm", None, None),
        ("layer.2", None, None),  # the layer itself is in none
        ("xlayers.3.q", "layers", None),
    ],
)
def test_layer_numbers(module: str, pattern: object, number: int | None) -> None:
    assert layer_number(module, pattern) == number


def test_all_linear_of_some_layers() -> None:
    model = model_of(["layers.0.linear", "layers.1.linear", "linear"])
    assert list(target_linears(model, "all-linear", layers_to_transform=[1]).linears) == ["layers.1.linear"]


def test_names() -> None:
    assert matches(["query"], "a.query")
    assert matches(["query"], "query")
    assert not matches(["query"], "a.myquery")
    assert not matches("query", "a.query")
    assert inside("model.classifier.dense", "classifier")
    assert inside("model.my_classifier", "classifier")  # PEFT's rule for training in full does not need a dot
    assert not inside("model.classifiers", "classifier")
    for wrong in ("", "(", [], [""], [3], 5, None):
        with pytest.raises(ValueError, match="field: expected"):
            fields.names("field", wrong)
    with pytest.raises(ValueError, match="field: expected to match"):
        target_modules(nn.Linear(2, 2), "field", ["x"])


class Mixed(nn.Module):
    """Linears in two layers and outside of them, and several kinds of other modules."""

    def __init__(self) -> None:
        super().__init__()
        layer = lambda: nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4, bias=False), "norm": nn.LayerNorm(4)})  # noqa: E731
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer(), layer()])
        self.model.vision = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.mha = nn.MultiheadAttention(4, 1)
        self.own = Own(4, 4)
        self.pre_head = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)


class Own(nn.Linear):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


QUERIES = ["model.layers.0.q", "model.layers.1.q"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q", "embed"], r"expected only linears \(nn.Linear, Conv1D\), got embed, of class Embedding"),
        (["q", "conv"], "got conv, of class Conv1d"),
        ({"q", "mha"}, "got mha, of class MultiheadAttention"),
        (["q", "layers"], "got model.layers, of class ModuleList"),
        (r".*layers\.0.*", "got model.layers.0, of class ModuleDict"),
        (["q", "norm"], "got model.layers.0.norm, of class LayerNorm"),
        (["q", "vision.1"], "got model.vision.1, of class ReLU"),
        (["q", "out_proj"], "got mha.out_proj, whose weight MultiheadAttention reads itself"),
        (["q", "own"], "own: linear: expected nn.Linear's own forward, got Own with a different one"),
    ],
)
def test_a_target_that_is_not_a_linear_is_refused(targets: Any, message: str) -> None:
    model = Mixed()
    with pytest.raises((TypeError, ValueError), match=f"^target_modules: .*{message}"):
        peftk.inject(model, peftk.LoraConfig(target_modules=targets))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_target_that_a_method_has_replaced_is_refused_by_name() -> None:
    model = Mixed()
    peftk.inject(model, peftk.LoraConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match=r"got model\.layers\.0\.q, which a method has replaced already"):
        peftk.inject(model, peftk.LoraConfig(target_modules=["q", "k"]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q", "v"]}, "target_modules: 'v' matches no module of the model"),
        ({"rank_pattern": {"q_porj": 4}}, "rank_pattern: 'q_porj' matches none of the adapted modules"),
        ({"rank_pattern": {"head": 4}}, "rank_pattern: 'head' matches none of the adapted modules"),
        ({"alpha_pattern": {"^layers": 9}}, r"alpha_pattern: '\^layers' matches none"),
        ({"rank_pattern": {"q": 4, "0.q": 2}}, "rank_pattern: '0.q' is not used"),
        ({"exclude_modules": ["zzz"]}, "exclude_modules: 'zzz' matches no module of the model"),
        ({"exclude_modules": {"head", "zzz"}}, "exclude_modules: 'zzz' matches no module of the model"),
        ({"exclude_modules": "zzz.*"}, r"exclude_modules: 'zzz\.\*' matches no module of the model"),
        (
            {"exclude_modules": ["layers.1"]},
            "matches model.layers.1, but not the modules inside: model.layers.1.q gets",
        ),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform: no target is in layer 7"),
        (
            {"target_modules": QUERIES, "layers_to_transform": [0]},
            "layers_to_transform: no effect, as all targets have full",
        ),
        ({"target_modules": [QUERIES[0], "k"], "layers_to_transform": [0, 3]}, "no target is in layer 3"),
        (
            {"target_modules": ["q", "vision.0"], "layers_to_transform": 0},
            "'vision.0' matches no module in layers_to_transform",
        ),
        ({"target_modules": ["k"], "bias": "lora_only"}, "bias: 'lora_only' trains none"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: True has no effect on model.layers.0.q, as an nn.Linear"),
    ],
)
def test_a_field_without_effect_gives_a_warning(config: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as told:
        peftk.inject(Mixed(), peftk.LoraConfig(**{"target_modules": ["q"], **config}))
    assert [one.filename for one in told] == [__file__] * len(told)  # where inject is called


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"exclude_modules": ["head", "model.layers.0.q"], "rank_pattern": {"1.q": 3}},
        {"exclude_modules": [], "layers_to_transform": [], "modules_to_save": [], "layers_pattern": []},
        {"target_modules": ["q", "head"], "modules_to_save": ["norm", "model.layers.0.q"], "bias": "lora_only"},
        {"target_modules": ["q", "head"], "exclude_modules": ["head"], "alpha_pattern": {"q": 3}},
        {"layers_to_transform": (0, 1), "layers_pattern": {"layers"}},
        {"target_modules": ["model.layers.1.q", "k"], "layers_to_transform": 0, "rank_pattern": {r".*\.q": 2, "k": 3}},
    ],
)
def test_there_is_no_warning_if_everything_has_an_effect(config: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftk.inject(Mixed(), peftk.LoraConfig(**{"target_modules": ["q"], **config}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "q"}, r"expected to match some linear.* got 'q'; .* \['q'\] matches endings of names"),
        ({"exclude_modules": ["q"]}, "that exclude_modules and modules_to_save leave; they take model.layers.0.q"),
        ({"modules_to_save": ["q"]}, "that exclude_modules and modules_to_save leave"),
        ({"layers_to_transform": 5}, "in layers_to_transform; model.layers.0.q, model.layers.1.q are in other layers"),
        ({"modules_to_save": ["nonesuch"]}, "modules_to_save: expected names of modules that have parameters"),
        ({"modules_to_save": ["head", "vision.1"]}, "modules_to_save: .* got 'vision.1'"),
        ({"modules_to_save": ["layers"]}, "modules_to_save: expected modules that are called, got model.layers, a Mod"),
        (
            {"modules_to_save": ["vision", "vision.0"]},
            r"expected no module inside of another, got model\.vision\.0, inside of model\.vision",
        ),
        (
            {"target_modules": ["pre_head"], "modules_to_save": ["head"]},
            "modules_to_save: .* by which pre_head trains",
        ),
        ({"target_modules": "all-linear", "modules_to_save": ["l", "d", "own"]}, "does not train in full"),
    ],
)
def test_a_config_that_cannot_be_applied_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        peftk.inject(Mixed(), peftk.LoraConfig(**{"target_modules": ["q"], **config}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers_pattern": "layers"}, "layers_pattern: expected layers_to_transform with it"),
        (
            {"target_modules": "q.*", "layers_to_transform": 0},
            "layers_to_transform: expected target_modules to be names",
        ),
        ({"target_modules": "q.*", "layers_pattern": "h"}, "layers_pattern: expected target_modules to be names"),
        ({"layers_to_transform": 0, "layers_pattern": ["h", "("]}, "layers_pattern: expected regular expressions, got"),
        ({"layers_to_transform": ()}, "layers_to_transform: expected some layer number"),
        ({"layers_to_transform": [0, -1]}, "layers_to_transform: expected layer numbers of 0 or more"),
        ({"layers_to_transform": [True]}, "layers_to_transform: expected layer numbers"),
        ({"layers_to_transform": [0.0]}, "layers_to_transform: expected layer numbers"),
        ({"layers_to_transform": "0"}, "layers_to_transform: expected layer numbers"),
        ({"layers_to_transform": {0: 1}}, "layers_to_transform: expected layer numbers"),
        ({"target_modules": {"q": 1}}, "target_modules: expected names"),
        ({"target_modules": {"q", 1}}, "target_modules: expected names"),
        ({"target_modules": None}, "target_modules: expected names"),
        ({"target_modules": (name for name in "q")}, "target_modules: expected names"),
        ({"modules_to_save": "head"}, "modules_to_save: expected a list of names, got 'head'"),
        ({"modules_to_save": ["("]}, r"modules_to_save\['\('\]: expected a regular expression"),
        ({"exclude_modules": b"q"}, "exclude_modules: expected names"),
        ({"rank_pattern": {"q": 1.0}}, r"rank_pattern\['q'\]: expected an integer"),
        ({"alpha_pattern": {"q": "1"}}, r"alpha_pattern\['q'\]: expected a finite number"),
        ({"r": True}, "r: expected an integer"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number"),
        ({"use_rslora": "False"}, "use_rslora: expected True or False, got 'False'"),
    ],
)
def test_invalid_fields_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peftk.LoraConfig(**{"target_modules": ["q"], **config})


def test_all_linear_leaves_out_modules_that_train_in_full_under_any_name() -> None:
    model = Mixed()
    del model.own
    names = peftk.inject(model, peftk.LoraConfig(target_modules="All-Linear", modules_to_save=["head"]))
    assert names == [f"model.layers.{i}.{n}" for i in (0, 1) for n in "qk"] + ["model.vision.0"]
    assert model.pre_head.weight.requires_grad
    assert model.head.bias.requires_grad


def test_all_linear_leaves_out_the_output_embedding() -> None:
    model = model_of(["layer.q", "head"])
    model.get_output_embeddings = lambda: model.head
    assert list(target_linears(model, "all-linear").linears) == ["layer.q"]
    assert list(target_linears(model, ["head"]).linears) == ["head"]


def test_a_key_of_a_pattern_is_an_expression_or_the_literal_name() -> None:
    for pattern in ({"a+b": 3}, {"x": 1, "a.b": 3}, {r".*\+b": 3}, {"^a.*": 3}):
        assert pattern_value(pattern, "a+b", 2) == 3
    for pattern in ({"b": 3}, {"a": 3}, {}):
        assert pattern_value(pattern, "a+b", 2) == 2
    assert pattern_value({"q": 3, "0.q": 4}, "layer.0.q", 2) == 3
    assert not list(idle_keys("field", {"a+b": 3}, ["a+b"]))


def test_a_layer_number_that_peft_reads_differently_gives_a_warning() -> None:
    model = model_of(["layers.0.q", "layers.1.q"])
    linears, [told] = target_linears(model, ["q"], layers_to_transform=[1])
    assert list(linears) == ["layers.1.q"]
    assert "reads no layer number in layers.0.q, peftk reads 0; with layers_pattern='layers' both read 0" in told
    model = model_of(["layers.0.experts.1.q", "layers.1.experts.1.q"])
    linears, [told] = target_linears(model, ["q"], layers_to_transform=[1])
    assert len(linears) == 2
    assert "reads layer 1 in layers.0.experts.1.q, peftk reads 1; with layers_pattern='layers' both read 0" in told
    linears, told = target_linears(model, ["q"], layers_to_transform=[1], layers_pattern="layers")
    assert (list(linears), told) == (["layers.1.experts.1.q"], [])


def test_experts_in_one_parameter_give_a_warning() -> None:
    model = model_of(["layers.0.q_proj", "layers.0.down_proj", "layers.0.experts.gate"])
    experts = model.get_submodule("layers.0.experts")
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(torch.zeros(2, 4, 4)) for _ in range(2))
    for targets, name in (
        ("all-linear", "gate_up_proj"),
        (["down_proj"], "down_proj"),
        (".*(q|up)_proj", "gate_up_proj"),
    ):
        _, [told] = target_linears(model, targets)
        assert told == (
            f"target_modules: layers.0.experts.{name} is one Parameter for all experts, not a linear, "
            "and gets no adapter"
        )
    for targets in (["q_proj"], ["0.q_proj", "0.down_proj"], "layers.0.down_proj"):
        assert not target_linears(model, targets).idle
    with pytest.raises(ValueError, match=r"to match some linear.*gate_up_proj is one Parameter for all experts"):
        target_linears(model, ["up_proj"])
