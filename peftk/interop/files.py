"""A checkpoint's two files, whichever library's: a JSON config and a safetensors file of weights.

All formats call the config `adapter_config.json`. What tells them apart is in it: HF PEFT's has "peft_type", peftk's
own "peftk", and AdapterHub's neither, but a "config" beside a "model_type". Only safetensors are read: a pickle can run
code.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from peftk import checks

CONFIG_FILE = "adapter_config.json"
FORMATS = ("peft", "adapterhub", "peftk")
_INTEGERS = (torch.int64, torch.int32, torch.bool)  # counters and masks among the buffers of a module that trains whole


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why. Nothing has been loaded."""


def folder(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected the path of a folder, got {path!r}")
    return Path(path)


def read_config(path: Path) -> dict[str, Any]:
    """The config as it lies there. Raises CheckpointError unless it is a JSON object."""
    file = path / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{path}: expected a folder with {CONFIG_FILE}, got none there")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{file}: expected JSON, got an error: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def checkpoint_format(config: Mapping[str, Any]) -> str:
    """Which library wrote this config: "peft", "adapterhub" or "peftk". Raises CheckpointError for another one's."""
    if "peft_type" in config:
        return "peft"
    if "peftk" in config:
        return "peftk"
    if "config" in config and "model_type" in config:
        return "adapterhub"
    raise CheckpointError(
        f"{CONFIG_FILE}: expected a config of HF PEFT (peft_type), AdapterHub (config, model_type) or peftk (peftk), "
        f"got the fields {', '.join(sorted(config)[:8]) or 'none'}"
    )


def read_weights(path: Path, name: str, *, pickled: str) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU; pickled: the name that the library gives to a pickled one.

    Raises CheckpointError for a missing, truncated or corrupt file, and for values that are not finite floats.
    """
    file = path / name
    if not file.is_file():
        found = pickled if (path / pickled).exists() else "none"
        hint = " (pickled files are not read: loading one can run code)" if found == pickled else ""
        raise CheckpointError(f"{path}: expected {name}, got {found} there{hint}")
    try:
        tensors = safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: expected a whole safetensors file, got an error: {error}") from error
    if not tensors:
        raise CheckpointError(f"{file}: expected weights, got no tensor")
    for key, tensor in tensors.items():
        if not key or not key.isprintable() or not all(key.split(".")):
            raise CheckpointError(f"{file}: expected dotted names, got the key {key!r}")
        if tensor.dtype not in (*checks.FLOATS, *_INTEGERS) or not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{file}: {key}: expected finite values in fp32, bf16, fp16 or fp64, got {tensor.dtype}"
            )
    return tensors


def write(
    path: str | os.PathLike[str], config: Mapping[str, Any], weights_file: str, weights: Mapping[str, Tensor]
) -> None:
    """Writes both files beside their places and then moves them there, the weights first.

    A failure leaves an earlier checkpoint as it was.
    """
    place = folder(path)
    if place.exists() and not place.is_dir():
        raise ValueError(f"path: expected a folder, got the file {place}")
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".saving-") as scratch:
        new_weights, new_config = Path(scratch) / weights_file, Path(scratch) / CONFIG_FILE
        safetensors.torch.save_file(tensors, new_weights, metadata={"format": "pt"})
        new_config.write_text(text, encoding="utf-8")
        os.replace(new_weights, place / weights_file)
        os.replace(new_config, place / CONFIG_FILE)
