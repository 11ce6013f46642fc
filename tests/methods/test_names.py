"""Tests that a LoraConfig adapts and trains the same in models of transformers as HF PEFT does with the same fields.

A config's fields are drawn from the names that a model has: their ends, the whole of them, parts of them that begin at
no dot, regular expressions made of them, and names that it does not have, in every form that a field takes.
"""

from __future__ import annotations

import copy
import random
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

import peftk
from peftk.methods.targets import inside
from tests.support import architectures

LINEARS = (nn.Linear, Conv1D)
# names of layers at the top and below, Conv1D, blocks in blocks, heads that end alike, experts, MHA, tied weights
DEFAULT = ("bert", "distilbert", "gpt2", "llama", "mixtral", "siglip", "t5", "swin", "wav2vec2")


# Where transformers keeps all experts in one Parameter, PEFT makes that of every target that ends like a linear of an
# expert of earlier versions, wherever it lies, and takes the ends of all other targets for the whole of them. peftk
# adapts the linears that are named, and warns where an expert is meant.
EXPERTS = "other targets than those given"


class Done(NamedTuple):
    """What a config did: the linears with rank and alpha, the model's own parameters that train, and the warnings."""

    adapted: dict[str, tuple[int, float]]
    trained: set[str]
    told: list[str]
    error: Exception | None = None


def by_peft(base: nn.Module, fields: dict[str, Any]) -> Done:
    model = copy.deepcopy(base)
    with warnings.catch_warnings(record=True) as caught, torch.device("meta"):
        warnings.simplefilter("always")
        config, error = None, None
        try:
            config = peft.LoraConfig(**copy.deepcopy(fields))
            model = peft.inject_adapter_in_model(config, model)
        except Exception as raised:
            error = raised
    told = [str(one.message) for one in caught]
    if config is not None and (config.target_parameters or _rewritten(fields["target_modules"], config.target_modules)):
        told.append(EXPERTS)
    if error is not None:
        return Done({}, set(), told, error)
    adapted, trained = {}, set()
    for name, module in model.named_modules():
        # peftk refuses linears in modules that train in full, and "all-linear" leaves them out
        whole = any(inside(_plain(name), kept) for kept in fields.get("modules_to_save", ()))
        if isinstance(module, LoraLayer) and not whole and "original_module" not in name:
            adapted[_plain(name)] = (module.r["default"], module.lora_alpha["default"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            trained.add(_plain(name))
    # nn.MultiheadAttention does not call this one
    unused = [name for name in adapted if type(base.get_submodule(name)) is NonDynamicallyQuantizableLinear]
    for name in unused:
        del adapted[name]
    trained -= {f"{name}.bias" for name in unused} if fields["bias"] == "lora_only" else set()
    return Done(adapted, trained, told)


def _rewritten(given: Any, kept: Any) -> bool:
    """Whether PEFT made different targets of these than it documents for a list or "all-linear"."""
    if isinstance(given, str):
        return given.lower() != "all-linear" and kept != given
    return set(given) != set(kept)


def by_peftk(model: nn.Module, fields: dict[str, Any]) -> Done:
    first = {id(module): name for name, module in reversed(list(model.named_modules()))}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            plan = peftk.LoraConfig(**fields).plan(model)
        except (TypeError, ValueError) as error:
            return Done({}, set(), [], error)
    # in PEFT, a module with several names has only one of them
    adapted = {first[id(model.get_submodule(name))]: (layer.r, layer.lora_alpha) for name, layer in plan.layers.items()}
    return Done(adapted, set(plan.trained), [str(one.message) for one in told])


def _plain(name: str) -> str:
    """A name without the parts that PEFT inserts."""
    return re.sub(r"\.(modules_to_save\.default|base_layer)(?=\.|$)", "", name)


FORMS = (list, tuple, set, frozenset, lambda names: dict.fromkeys(names).keys(), np.array)


def draw(model: nn.Module, rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random fields of a config for the model, as PEFT takes them, and the same in equivalent forms."""
    modules = {name: module for name, module in model.named_modules() if name}
    linears = [name for name, module in modules.items() if isinstance(module, LINEARS)]

    def end(name: str) -> str:
        steps = name.split(".")
        return ".".join(steps[-rng.randint(1, min(3, len(steps))) :])

    def some(names: list[str], most: int = 4) -> list[str]:
        return [end(rng.choice(names)) for _ in range(rng.randint(1, most))]

    def expression(names: list[str]) -> str:
        return rng.choice(
            (
                rf".*\.({'|'.join(map(re.escape, some(names)))})",
                rf".*{re.escape(end(rng.choice(names)))}",
                ".*[kq].*",
            )
        )

    def maybe(p: float, value: Any) -> Any:
        return value() if rng.random() < p else None

    wrong = ["nonesuch", "0", "proj", rng.choice(linears)[1:], rng.choice(linears) + ".x"]
    targets = rng.choice(
        (
            lambda: some(linears),
            lambda: some(linears),
            lambda: [rng.choice(linears) for _ in range(3)],
            lambda: [*some(linears), rng.choice(wrong)],
            lambda: some(list(modules)),
            lambda: expression(linears),
            lambda: expression(linears),
            lambda: rng.choice(("all-linear", "All-Linear")),
        )
    )()
    fields = {
        "target_modules": targets,
        "exclude_modules": maybe(
            0.4,
            lambda: rng.choice(
                (some(linears, 2), some(list(modules), 2), expression(linears), [rng.choice(wrong)], [], "")
            ),
        ),
        "modules_to_save": maybe(
            0.4,
            lambda: rng.choice(
                (
                    [rng.choice(linears)],
                    [end(rng.choice(list(modules)))],
                    [rng.choice(list(modules)).rpartition(".")[2][1:] or "x"],
                    [end(rng.choice(linears))[-5:].strip(".")],
                    [*some(list(modules), 1), rng.choice(wrong)],
                    [],
                )
            ),
        ),
        "bias": rng.choice(("none", "none", "all", "lora_only")),
    }
    for field, values in (("rank_pattern", (1, 2, 3)), ("alpha_pattern", (1, 2.5, 4))):
        keys = [
            rng.choice(
                (
                    end(name),
                    f"^{re.escape(name)}",
                    rf".*\.\d+\..*{re.escape(name.rpartition('.')[2])}",
                    rng.choice(wrong),
                )
            )
            for name in rng.sample(linears, min(len(linears), rng.choice((0, 0, 1, 3))))
        ]
        fields[field] = {key: rng.choice(values) for key in keys}
    if not isinstance(targets, str) and rng.random() < 0.5:
        lists = re.findall(r"([^.]+)\.\d+\.", " ".join(linears))
        fields["layers_to_transform"] = rng.choice((0, 1, [0], [1, 0], [0, 7], [], range(2)))
        if lists:
            one = rng.choice(lists)
            fields["layers_pattern"] = maybe(0.5, lambda: rng.choice((one, [one], ["nonesuch", one], [], "h|layers")))
    fields = {name: value for name, value in fields.items() if value is not None}
    others = dict(fields)
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        if isinstance(fields.get(name), list):
            others[name] = rng.choice(FORMS)(fields[name])
    layers = fields.get("layers_to_transform")
    if isinstance(layers, list) and layers:
        others["layers_to_transform"] = rng.choice((*FORMS, torch.tensor))(layers)
    return {"r": 1, **fields}, {"r": np.int64(1), **others}


# What peftk refuses and PEFT takes: peftk's message, and the reason.
REFUSED = {
    r"only linears .*, of class (\w*Embedding|Conv[123]d|MultiheadAttention)$": "PEFT adapts these, peftk linears only",
    "expected nn.Linear's own forward": "PEFT adapts whatever has nn.Linear for a base class",
    "that is called, is not the output embedding": "PEFT puts adapters into modules that train in full",
    "whose weight MultiheadAttention reads itself": "PEFT's adapter there is never called",
    "modules_to_save: expected names of modules that have parameters": "PEFT passes over names that mean nothing",
    "modules_to_save: expected modules with parameters of their own": "PEFT trains a copy, not what others share",
    "modules_to_save: expected no module inside of another": "PEFT never calls the inner one's copy that it trains",
    "modules_to_save: expected modules without adapters": "PEFT trains W beside the adapter, in a copy of both",
}
# What PEFT refuses and peftk takes: PEFT's message, and peftk's warning, if any.
TAKEN = {
    "not found in the base model|No modules were targeted": "HF PEFT reads no layer number",
    "Cannot convert PEFT target": "",  # see EXPERTS
    "cannot be applied to modules of type .*lora": "",  # "all-linear" leaves out modules that train in full
    "incompatible with Mamba-based models": "",  # PEFT goes by names
    "`get_input_embeddings` not auto.handled": "",  # PEFT looks for tied weights before it looks at targets
}
# Warnings of PEFT that peftk gives too.
WARNED = {
    "no modules were excluded": "exclude_modules",
    "rank_pattern keys": "rank_pattern",
    "alpha_pattern keys": "alpha_pattern",
}


def difference(model: nn.Module, fields: dict[str, Any], others: dict[str, Any]) -> str | None:
    """A text about what peftk does differently from PEFT, if that is not allowed."""
    theirs, ours = by_peft(model, fields), by_peftk(model, others)
    if EXPERTS in theirs.told:
        return None
    if ours.error is not None:
        known = theirs.error is not None or any(re.search(said, str(ours.error)) for said in REFUSED)
        return None if known else f"refused: {ours.error}"
    if theirs.error is not None:
        for said, warned in TAKEN.items():
            if re.search(said, str(theirs.error)) and warned in " ".join(ours.told):
                return None
        return f"taken: {theirs.error}"
    if not any("HF PEFT reads" in one for one in ours.told):
        if ours.adapted != theirs.adapted:
            return f"adapted: {sorted(ours.adapted.items() ^ theirs.adapted.items())[:6]}"
        if ours.trained != theirs.trained:
            return f"trained: {sorted(ours.trained ^ theirs.trained)[:6]}"
    for said, field in WARNED.items():
        if any(said in one for one in theirs.told) and not any(one.startswith(field) for one in ours.told):
            return f"not told of {field}, but {ours.told}"
    return None


def differences(name: str, configs: int) -> list[str] | None:
    """The differences in random configs for an architecture; None if it cannot be built, or has no linears."""
    model = architectures.build(name)
    if model is None or not any(isinstance(module, LINEARS) for module in model.modules()):
        return None
    rng, found = random.Random(name), []
    for _ in range(configs):
        fields, others = draw(model, rng)
        different = difference(model, fields, others)
        if different is not None:
            found.append(f"{name}: {different[:400]}; with {others}")
    return found


@pytest.mark.parametrize("name", DEFAULT)
def test_as_peft(name: str) -> None:
    assert differences(name, 3) == []


@pytest.mark.full
def test_sixty_architectures_as_peft() -> None:
    found = [differences(name, 3) for name in architectures.NAMES[::6]]
    built = [some for some in found if some is not None]
    assert [one for some in built for one in some] == []
    assert len(built) >= 60


@pytest.mark.long
def test_every_architecture_as_peft() -> None:
    found = [differences(name, 8) for name in architectures.NAMES]
    built = [some for some in found if some is not None]
    assert [one for some in built for one in some] == []
    assert len(built) >= 500
