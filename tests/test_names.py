"""What a LoraConfig adapts and trains in models of transformers, next to what HF PEFT does with the same fields.

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
from tests import architectures

CONFIGS = 6  # drawn for each model


# Where transformers keeps all experts in one Parameter, PEFT turns every target that is called like a linear of an expert
# of earlier versions into that Parameter, and leaves out linears outside of the experts that are called so, too.
EXPERTS = "target_parameters instead of target_modules"


class Done(NamedTuple):
    """What a config did: the linears with their rank and alpha, what of the model itself trains, and what was said."""

    adapted: dict[str, tuple[int, float]]
    trained: set[str]
    told: list[str]
    error: Exception | None = None


def by_peft(base: nn.Module, fields: dict[str, Any]) -> Done:
    model = copy.deepcopy(base)
    with warnings.catch_warnings(record=True) as told, torch.device("meta"):
        warnings.simplefilter("always")
        try:
            config = peft.LoraConfig(**copy.deepcopy(fields))
            model = peft.inject_adapter_in_model(config, model)
        except Exception as error:
            return Done({}, set(), [], error)
    adapted, trained = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "original_module" not in name:
            adapted[_plain(name)] = (module.r["default"], module.lora_alpha["default"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            trained.add(_plain(name))
    # those that stand in modules that train whole are what peftk refuses, or "all-linear" leaves out
    adapted = {
        n: r for n, r in adapted.items() if not any(inside(n, kept) for kept in fields.get("modules_to_save", ()))
    }
    # nn.MultiheadAttention never calls this one
    unused = [name for name in adapted if type(base.get_submodule(name)) is NonDynamicallyQuantizableLinear]
    for name in unused:
        del adapted[name]
    trained -= {f"{name}.bias" for name in unused} if fields["bias"] == "lora_only" else set()
    told = [str(one.message) for one in told]
    return Done(adapted, trained, [*told, *([EXPERTS] if config.target_parameters else [])])


def by_peftk(model: nn.Module, fields: dict[str, Any]) -> Done:
    first = {id(module): name for name, module in reversed(list(model.named_modules()))}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            plan = peftk.LoraConfig(**fields).plan(model)
        except (TypeError, ValueError) as error:
            return Done({}, set(), [], error)
    # a module that has several names has one of them in PEFT
    adapted = {first[id(model.get_submodule(name))]: (layer.r, layer.lora_alpha) for name, layer in plan.layers.items()}
    return Done(adapted, set(plan.trained), [str(one.message) for one in told])


def _plain(name: str) -> str:
    """A name without what PEFT puts between its parts."""
    return re.sub(r"\.(modules_to_save\.default|base_layer)(?=\.|$)", "", name)


FORMS = (list, tuple, set, frozenset, lambda names: dict.fromkeys(names).keys(), np.array)


def draw(model: nn.Module, random: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of a config for the model, as PEFT takes them, and the same in other forms."""
    modules = {name: module for name, module in model.named_modules() if name}
    linears = [name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))]

    def end(name: str) -> str:
        steps = name.split(".")
        return ".".join(steps[-random.randint(1, min(3, len(steps))) :])

    def some(names: list[str], most: int = 4) -> list[str]:
        return [end(random.choice(names)) for _ in range(random.randint(1, most))]

    def expression(names: list[str]) -> str:
        return random.choice(
            (
                rf".*\.({'|'.join(map(re.escape, some(names)))})",
                rf".*{re.escape(end(random.choice(names)))}",
                ".*[kq].*",
            )
        )

    def maybe(p: float, value: Any) -> Any:
        return value() if random.random() < p else None

    wrong = ["nonesuch", "0", "proj", random.choice(linears)[1:], random.choice(linears) + ".x"]
    targets = random.choice(
        (
            lambda: some(linears),
            lambda: some(linears),
            lambda: [random.choice(linears) for _ in range(3)],
            lambda: [*some(linears), random.choice(wrong)],
            lambda: some(list(modules)),
            lambda: expression(linears),
            lambda: expression(linears),
            lambda: random.choice(("all-linear", "All-Linear")),
        )
    )()
    fields = {
        "target_modules": targets,
        "exclude_modules": maybe(
            0.4,
            lambda: random.choice(
                (some(linears, 2), some(list(modules), 2), expression(linears), [random.choice(wrong)], [], "")
            ),
        ),
        "modules_to_save": maybe(
            0.4,
            lambda: random.choice(
                (
                    [random.choice(linears)],
                    [end(random.choice(list(modules)))],
                    [random.choice(list(modules)).rpartition(".")[2][1:] or "x"],
                    [end(random.choice(linears))[-5:].strip(".")],
                    [*some(list(modules), 1), random.choice(wrong)],
                    [],
                )
            ),
        ),
        "bias": random.choice(("none", "none", "all", "lora_only")),
    }
    for field, values in (("rank_pattern", (1, 2, 3)), ("alpha_pattern", (1, 2.5, 4))):
        keys = [
            random.choice(
                (
                    end(name),
                    f"^{re.escape(name)}",
                    rf".*\.\d+\..*{re.escape(name.rpartition('.')[2])}",
                    random.choice(wrong),
                )
            )
            for name in random.sample(linears, min(len(linears), random.choice((0, 0, 1, 3))))
        ]
        fields[field] = {key: random.choice(values) for key in keys}
    if not isinstance(targets, str) and random.random() < 0.5:
        lists = re.findall(r"([^.]+)\.\d+\.", " ".join(linears))
        fields["layers_to_transform"] = random.choice((0, 1, [0], [1, 0], [0, 7], [], range(2)))
        if lists:
            one = random.choice(lists)
            fields["layers_pattern"] = maybe(
                0.5, lambda: random.choice((one, [one], ["nonesuch", one], [], "h|layers"))
            )
    fields = {name: value for name, value in fields.items() if value is not None}
    others = dict(fields)
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        if isinstance(fields.get(name), list):
            others[name] = random.choice(FORMS)(fields[name])
    layers = fields.get("layers_to_transform")
    if isinstance(layers, list) and layers:
        others["layers_to_transform"] = random.choice((*FORMS, torch.tensor))(layers)
    return {"r": 1, **fields}, {"r": np.int64(1), **others}


# What peftk refuses and PEFT takes, by what it says.
REFUSED = {
    r"alone, got \S+, of class (Embedding|Conv1d|Conv2d|Conv3d|MultiheadAttention)$": "PEFT adapts these, peftk linears only",
    "expected nn.Linear's own forward": "PEFT adapts whatever has nn.Linear for a base class",
    "whose weight MultiheadAttention reads itself": "PEFT's adapter there is never called",
    "modules_to_save: expected names of modules that have parameters": "PEFT passes over names that mean nothing",
    "modules_to_save: expected modules with parameters of their own": "PEFT trains a copy; the other module stays as it was",
    "modules_to_save: expected modules apart from each other": "PEFT's copy of the inner one is not the one that is called",
    "modules_to_save: expected modules without adapters": "PEFT trains W beside the adapter, in a copy of both",
}
# What PEFT refuses and peftk takes: PEFT's words, and what peftk warns of, if anything.
TAKEN = {
    "not found in the base model|No modules were targeted": "HF PEFT reads no layer number",
    "Cannot convert PEFT target": "",  # see EXPERTS
    "cannot be applied to modules of type .*lora": "",  # "all-linear" leaves out what trains whole
    "incompatible with Mamba-based models": "",  # PEFT goes by names
}
# Where this is said, the linears that peftk adapts are others.
OTHERWISE = ("HF PEFT reads", EXPERTS)
# Of what PEFT warns, peftk does, too.
WARNED = {
    "no modules were excluded": "exclude_modules",
    "rank_pattern keys": "rank_pattern",
    "alpha_pattern keys": "alpha_pattern",
}


def difference(model: nn.Module, fields: dict[str, Any], others: dict[str, Any]) -> str | None:
    """What peftk does otherwise than PEFT, in words, where it may not."""
    theirs, ours = by_peft(model, fields), by_peftk(model, others)
    if ours.error is not None:
        known = theirs.error is not None or any(re.search(said, str(ours.error)) for said in REFUSED)
        return None if known else f"refused: {ours.error}"
    if theirs.error is not None:
        for said, warned in TAKEN.items():
            if re.search(said, str(theirs.error)) and warned in " ".join(ours.told):
                return None
        return f"taken: {theirs.error}"
    if not any(words in one for words in OTHERWISE for one in (*ours.told, *theirs.told)):
        if ours.adapted != theirs.adapted:
            return f"adapted: {sorted(ours.adapted.items() ^ theirs.adapted.items())[:6]}"
        if ours.trained != theirs.trained:
            return f"trained: {sorted(ours.trained ^ theirs.trained)[:6]}"
        for said, field in WARNED.items():
            if any(said in one for one in theirs.told) and not any(one.startswith(field) for one in ours.told):
                return f"not told of {field}, but {ours.told}"
    return None


if __name__ == "__main__":
    import sys, time, collections

    names = sys.argv[1:] or architectures.NAMES[::7]
    for name in names:
        model = architectures.build(name)
        if model is None:
            print(name, "not built")
            continue
        t = time.time()
        rng = random.Random(name)
        for i in range(CONFIGS):
            try:
                fields, others = draw(model, rng)
            except IndexError:
                print(name, "no linears")
                break
            try:
                d = difference(model, fields, others)
            except Exception as e:
                import traceback

                traceback.print_exc(limit=-3)
                d = "CRASH"
            if d:
                print(name, i, d, "   FIELDS", {k: v for k, v in others.items() if k != "r"}, flush=True)
        print("--", name, round(time.time() - t, 2), flush=True)
