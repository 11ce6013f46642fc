"""peftk's own checkpoints: any methods, several at once.

A folder with `adapter_config.json`, {"peftk": version, "methods": [{"method": class of the config, its fields …}, …]},
in the order in which they were injected, and `adapter_model.safetensors`, which holds exactly the parameters that
train, the methods' own and the model's, and the buffers of modules that train whole, by their names in the injected
model. Beside "methods" may stand what a PEFT config says of the base model (`files.ABOUT`), "embeddings": names of
weights of the base model that an earlier checkpoint brought, and "scalings": lora_alpha and use_rslora of LoRALinear
layers that no method put in.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftk import checks
from peftk.interop import files
from peftk.interop.files import CONFIG_FILE, CheckpointError
from peftk.methods.plan import Config
from peftk.methods.registry import CONFIGS
from peftk.nn.llama_adapter import Projections

WEIGHTS_FILE = "adapter_model.safetensors"
VERSION = 1
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in checks.FLOATS}


class OwnCheckpoint(NamedTuple):
    """A checkpoint, checked in itself. tensors: by their names in the injected model; the others as in the file."""

    configs: Sequence[Config]
    tensors: Mapping[str, Tensor]
    scalings: Mapping[str, tuple[float, bool]]
    embeddings: Sequence[str]
    about: Mapping[str, str]


def load(path: str | os.PathLike[str]) -> OwnCheckpoint:
    """Reads a checkpoint whole. Raises CheckpointError for one that is damaged."""
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
    """Writes a checkpoint. Raises ValueError for a config of none of peftk's methods."""
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
    """A config's fields as JSON gives them back: two configs say the same where these are equal."""
    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def plain(value: Any) -> Any:
    """A config's value as JSON gives it back."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
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
