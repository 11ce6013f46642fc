"""Reads and writes peftk's own checkpoint format, for any methods, also several at once.

A checkpoint is a folder with `adapter_config.json`, {"peftk": version, "methods": [{"method": class of the config, its
fields …}, …]} in the order of injection, and `adapter_model.safetensors`, which holds exactly the parameters that
train, the methods' own and the model's, and the buffers of modules that train in full, by their names in the injected
model. Further fields of the config: those of a PEFT config about the base model (`files.ABOUT`); "embeddings", the
names of base model weights that an earlier checkpoint brought; and "scalings", lora_alpha and use_rslora of LoRALinear
layers that were put in by hand.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftk.adapters import checks
from peftk.checkpoints import files
from peftk.checkpoints.contents import (
    AnyPath,
    Contents,
    Origin,
    about_of,
    embeddings,
    named_values,
    one_scaling,
    origin_of,
    same_rank,
    trained_names,
    values_of,
)
from peftk.checkpoints.files import CONFIG_FILE, CheckpointError, plain_name
from peftk.methods.inject import lora_layers
from peftk.methods.lora import LoraConfig
from peftk.methods.plan import Config, Injection, adapter_parameters, injections
from peftk.methods.registry import CONFIGS
from peftk.methods.targets import pattern_value
from peftk.nn.llama_adapter import Projections

WEIGHTS_FILE = "adapter_model.safetensors"
VERSION = 1
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in checks.FLOATS}


class OwnCheckpoint(NamedTuple):
    """A checkpoint, checked for consistency. tensors: by their names in the injected model; the rest as in the file."""

    configs: Sequence[Config]
    tensors: Mapping[str, Tensor]
    scalings: Mapping[str, tuple[float, bool]]
    embeddings: Sequence[str]
    about: Mapping[str, str]


def load(path: str | os.PathLike[str]) -> OwnCheckpoint:
    """Reads a checkpoint. Raises CheckpointError if it is damaged."""
    folder = files.folder(path)
    config = files.read_config(folder)
    file = folder / CONFIG_FILE
    if config.get("peftk") != VERSION:
        raise CheckpointError(f"{file}: expected peftk {VERSION}, got {config.get('peftk')!r}")
    methods = config.get("methods")
    if not isinstance(methods, list) or not all(isinstance(method, dict) for method in methods):
        raise CheckpointError(f"{file}: expected methods to be a list of configs, got {methods!r}")
    embeddings = config.get("embeddings", [])
    if not isinstance(embeddings, list) or not all(isinstance(name, str) for name in embeddings):
        raise CheckpointError(f"{file}: expected embeddings to be a list of names, got {embeddings!r}")
    return OwnCheckpoint(
        [_decode(file, method) for method in methods],
        files.read_weights(folder, WEIGHTS_FILE, pickled="adapter_model.bin"),
        _scalings(file, config.get("scalings", {})),
        embeddings,
        files.about(config, file),
    )


def save(path: str | os.PathLike[str], checkpoint: OwnCheckpoint) -> None:
    """Writes a checkpoint. Raises ValueError for a config that is not one of peftk's methods."""
    config: dict[str, Any] = {
        "peftk": VERSION,
        "methods": [_encode(method) for method in checkpoint.configs],
        **checkpoint.about,
    }
    if checkpoint.scalings:
        config["scalings"] = checkpoint.scalings
    if checkpoint.embeddings:
        config["embeddings"] = list(checkpoint.embeddings)
    files.write(path, config, WEIGHTS_FILE, checkpoint.tensors)


def _scalings(file: os.PathLike[str], scalings: Any) -> dict[str, tuple[float, bool]]:
    try:
        found = {name: (float(lora_alpha), bool(use_rslora)) for name, (lora_alpha, use_rslora) in scalings.items()}
        if all(math.isfinite(lora_alpha) for lora_alpha, _ in found.values()):
            return found
    except (AttributeError, TypeError, ValueError, OverflowError):
        pass
    raise CheckpointError(f"{file}: expected scalings to give each layer lora_alpha, use_rslora, got {scalings!r}")


def _encode(config: Config) -> dict[str, Any]:
    name = type(config).__name__
    if CONFIGS.get(name) is not type(config):
        raise ValueError(f"config: expected one of {', '.join(CONFIGS)}, got {name}")
    return {"method": name, **fields_of(config)}


def fields_of(config: Any) -> dict[str, Any]:
    """A config's fields in the form that JSON returns. Two configs are equivalent if these are equal."""
    return {field.name: json_form(getattr(config, field.name)) for field in dataclasses.fields(config)}


def json_form(value: Any) -> Any:
    """A field's value in the form that JSON returns."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {key: json_form(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json_form(item) for item in value]
    return value


def _decode(file: os.PathLike[str], method: dict[str, Any]) -> Config:
    kind = CONFIGS.get(str(method.get("method")))
    if kind is None:
        raise CheckpointError(f"{file}: expected a method of {', '.join(CONFIGS)}, got {method.get('method')!r}")
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {name: value for name, value in method.items() if name != "method"}
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise CheckpointError(f"{file}: expected fields of {kind.__name__}, got {', '.join(unknown)}")
    dtype, projections = fields.get("adapter_dtype"), fields.get("projections")
    try:
        if dtype is not None:
            if not isinstance(dtype, str) or dtype not in _DTYPES:
                raise ValueError(f"adapter_dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
            fields["adapter_dtype"] = _DTYPES[dtype]
        if projections is not None:
            if not isinstance(projections, list) or not 4 <= len(projections) <= len(Projections._fields):
                raise ValueError(f"projections: expected {', '.join(Projections._fields)}, got {projections!r}")
            fields["projections"] = Projections(*projections)
        return kind(**fields)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: {kind.__name__}: {error}") from error


def contents_of(model: nn.Module, own: OwnCheckpoint, path: AnyPath) -> Contents:
    """What the checkpoint brings to an injected model. Raises CheckpointError if it does not fit."""
    records = injections(model)
    saved, present = ([type(c).__name__ for c in configs] for configs in (own.configs, [r.config for r in records]))
    if saved != present:
        names = [", ".join(group) or "none" for group in (present, saved)]
        raise CheckpointError(f"{path}: expected the model's methods, {names[0]}, got {names[1]}")
    wanted = {*trained_names(model), *_buffers(model), *own.embeddings}
    files.same_names(path, "tensors for exactly what the model trains", own.tensors, wanted)
    layers = {plain_name(name): layer for name, layer in lora_layers(model)}
    alphas = {}
    for config, record in zip(own.configs, records, strict=True):
        if isinstance(config, LoraConfig):
            for name in filter(layers.__contains__, map(plain_name, record.layers)):
                rank, lora_A = pattern_value(config.rank_pattern, name, config.r), own.tensors[f"{name}.lora_A"]
                if lora_A.shape[:1] != (rank,):
                    raise CheckpointError(
                        f"{path}: {name}: expected rank {rank} of {files.CONFIG_FILE}, got lora_A {list(lora_A.shape)}"
                    )
                same_rank(path, name, layers[name], lora_A)
                alphas[name] = (float(pattern_value(config.alpha_pattern, name, config.lora_alpha)), config.use_rslora)
        elif _compared_fields(config) != _compared_fields(record.config):
            raise CheckpointError(f"{path}: expected the model's {record.config!r}, got {config!r}")
    by_hand = layers.keys() - alphas.keys()
    files.same_names(path, "scalings of the LoRALinear layers that were put in by hand", own.scalings, by_hand)
    of_embeddings, values = embeddings(model), dict(named_values(model))
    for name in own.embeddings:
        if name not in values or id(values[name]) not in of_embeddings:
            raise CheckpointError(f"{path}: expected embeddings to name embeddings of the model, got {name}")
    return Contents(own.tensors, {**alphas, **own.scalings}, Origin(own.about, tuple(own.embeddings)))


def _current_config(model: nn.Module, record: Injection) -> Config:
    """The config that describes the adapters as they are now: their ranks, scalings and dtypes may have changed."""
    config: Any = record.config
    changed: dict[str, Any] = {}
    places = {plain_name(name) for name in (*record.layers, *record.attached)}
    modules = [part for n, m in model.named_modules() if plain_name(n) in places for part in m.modules()]
    dtypes = {parameter.dtype for module in modules for parameter in adapter_parameters(module).values()}
    if getattr(config, "adapter_dtype", None) is not None and len(dtypes) == 1:
        changed["adapter_dtype"] = dtypes.pop()
    layers = {plain_name(name): layer for name, layer in lora_layers(model) if plain_name(name) in places}
    if isinstance(config, LoraConfig) and layers:
        changed["use_rslora"], alphas = one_scaling(layers)
        ranks = {name: layer.r for name, layer in layers.items()}
        if any(rank != pattern_value(config.rank_pattern, name, config.r) for name, rank in ranks.items()):
            changed["rank_pattern"] = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
        if any(alpha != pattern_value(config.alpha_pattern, name, config.lora_alpha) for name, alpha in alphas.items()):
            changed["alpha_pattern"] = {f"^{re.escape(name)}": alpha for name, alpha in alphas.items()}
        dropouts = {layer.lora_dropout for layer in layers.values()}
        if len(dropouts) == 1:
            changed["lora_dropout"] = dropouts.pop()
    return dataclasses.replace(config, **changed) if changed else config


def save_model(model: nn.Module, path: AnyPath, names: Collection[str]) -> None:
    """Saves what was injected into a model. names: of the Parameters that train."""
    tensors, brought = values_of(model, (*names, *_buffers(model))), values_of(model, origin_of(model).embeddings)
    records = injections(model)
    placed = {plain_name(name) for record in records for name in record.layers}
    by_hand = {plain_name(n): layer for n, layer in lora_layers(model) if plain_name(n) not in placed}
    own = OwnCheckpoint(
        configs=[_current_config(model, record) for record in records],
        tensors={**brought, **tensors},
        scalings={name: (layer.lora_alpha, layer.use_rslora) for name, layer in by_hand.items()},
        embeddings=[name for name in brought if name not in tensors],
        about={field: value for field, value in about_of(model).items() if value is not None},
    )
    save(path, own)


def _buffers(model: nn.Module) -> list[str]:
    """The persistent buffers of modules that train in full; a BatchNorm, for one, changes them in training."""
    persistent = model.state_dict().keys()
    trained = {plain_name(name) for record in injections(model) for name in record.trained}
    frozen = [name.split(".") for name, _ in model.named_parameters() if plain_name(name) not in trained]
    mixed = {".".join(parts[:depth]) for parts in frozen for depth in range(len(parts))}
    whole = [n for n, m in model.named_modules() if n not in mixed and any(True for _ in m.parameters())]
    within = tuple(f"{name}." if name else "" for name in whole)
    return [plain_name(name) for name, _ in model.named_buffers() if name in persistent and name.startswith(within)]


def _compared_fields(config: Config) -> dict[str, Any]:
    """The fields in which a checkpoint's config and the model's must agree: all but the dtype."""
    return {name: value for name, value in fields_of(config).items() if name != "adapter_dtype"}
