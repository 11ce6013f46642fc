"""Which modules a config means: the same as HF PEFT's own rule, over names of several model families."""

from __future__ import annotations

import contextlib
import itertools
import re

import pytest
from peft import LoraConfig as PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from peftk.methods import fields
from peftk.methods.targets import inside, layer_number, matches, target_linears, target_modules

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
    """A linear under each name, which may hold others."""
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
    # a match, or True; an excluded module gives an object of a class of its own, which is true as well
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
        assert set(target_linears(model_of(NAMES), targets, **arguments)) == set(expected)


@pytest.mark.parametrize(
    ("module", "pattern", "number"),
    [
        ("layers.1.q", None, 1),
        ("model.layers.3.experts.7.down", None, 3),
        ("model.layers.3.experts.7.down", "experts", 7),
        ("model.layers.3.experts.7.down", ["nonesuch", "layers"], 3),
        ("model.norm", None, None),
        ("layer.2", None, None),  # the layer itself lies in none
        ("xlayers.3.q", "layers", None),
    ],
)
def test_layer_numbers(module: str, pattern: object, number: int | None) -> None:
    assert layer_number(module, pattern) == number


def test_all_linear_of_some_layers() -> None:
    model = model_of(["layers.0.linear", "layers.1.linear", "linear"])
    assert list(target_linears(model, "all-linear", layers_to_transform=[1])) == ["layers.1.linear"]


def test_names() -> None:
    assert matches(["query"], "a.query")
    assert matches(["query"], "query")
    assert not matches(["query"], "a.myquery")
    assert not matches("query", "a.query")
    assert inside("model.classifier.dense", "classifier")
    assert inside("model.my_classifier", "classifier")  # PEFT's rule for what trains whole: not from a dot on
    assert not inside("model.classifiers", "classifier")
    for wrong in ("", "(", [], [""], [3], 5, None):
        with pytest.raises(ValueError, match="field: expected"):
            fields.names("field", wrong)
    with pytest.raises(ValueError, match="field: expected to match"):
        target_modules(nn.Linear(2, 2), "field", ["x"])
