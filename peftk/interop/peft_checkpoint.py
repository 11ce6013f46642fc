"""HF PEFT's LoRA checkpoints: the one place that knows the format.

A checkpoint is a folder with `adapter_config.json` (peft_type "LORA", hyper-parameters) and
`adapter_model.safetensors`, with keys `base_model.model.<module>.lora_A.weight` [R, K] and `….lora_B.weight` [N, R].
The scaling is lora_alpha / r, or lora_alpha / √r with use_rslora, where rank_pattern and alpha_pattern give a module
its own. Only safetensors are read: a pickle can run code. Source: peft 0.21, utils/save_and_load.py and its files.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why. Nothing has been loaded."""


class LoadedAdapter(NamedTuple):
    """One module's adapter as it lies in a checkpoint."""

    lora_A: Tensor
    lora_B: Tensor
    lora_alpha: float
    use_rslora: bool

    @property
    def scaling(self) -> float:
        return scaling(self.lora_alpha, self.lora_A.shape[0], self.use_rslora)


def load(path: str | os.PathLike[str]) -> dict[str, LoadedAdapter]:
    """Reads a LoRA checkpoint whole: module name → its factors and scaling.

    Raises CheckpointError for a missing, truncated or corrupt file, a method other than LoRA, a LoRA variant that is
    more than `s·BA` (DoRA, trained biases, further trained modules), or factors that do not belong together.
    """
    folder = Path(path)
    config = _read_config(folder)
    tensors = _read_weights(folder)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in _FACTORS if key.endswith(s)), None)
        if suffix is None or not key.startswith(_PREFIX):
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: expected keys {_PREFIX}<module>.lora_{{A,B}}.weight, got {key!r}"
            )
        halves.setdefault(key[len(_PREFIX) : -len(suffix)], {})[suffix] = tensor
    if not halves:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: expected LoRA factors, got no tensor")
    return {name: _adapter(folder, name, pair, config) for name, pair in halves.items()}


def save(path: str | os.PathLike[str], adapters: Mapping[str, tuple[Tensor, Tensor]], config: dict[str, Any]) -> None:
    """Writes a checkpoint that HF PEFT reads: module name → (A, B), and the config's fields.

    Both files are written beside their places and then moved there, the weights first: a failure leaves an earlier
    checkpoint as it was.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, factors in adapters.items():
        for suffix, factor in zip(_FACTORS, factors, strict=True):
            tensors[_PREFIX + name + suffix] = factor.detach().cpu().contiguous()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        weights, text = Path(scratch) / WEIGHTS_FILE, Path(scratch) / CONFIG_FILE
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
        text.write_text(json.dumps({"peft_type": "LORA", **config}, indent=2, sort_keys=True) + "\n")
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(text, folder / CONFIG_FILE)


def scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """s = lora_alpha / r, or lora_alpha / √r for rsLoRA (dimensionless)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the module's name from a dot on."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder}: expected a folder with {CONFIG_FILE}, got none there")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON, got an error: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{file}: expected peft_type 'LORA', got {kind!r}")
    for field in ("r", "lora_alpha"):
        value = config.get(field)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(f"{file}: expected {field} to be a finite number, got {value!r}")
    unsupported = [
        field for field in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias") if config.get(field)
    ]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        found = ", ".join(f"{field}={config[field]!r}" for field in unsupported)
        raise CheckpointError(f"{file}: expected a LoRA that is s·BA alone, got {found}")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickled = sorted(p.name for p in folder.glob("adapter_model.bin"))
        raise CheckpointError(
            f"{folder}: expected {WEIGHTS_FILE}, got {pickled[0] if pickled else 'none'} there"
            + (" (pickled files are not read: loading one can run code)" if pickled else "")
        )
    try:
        return safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: expected a whole safetensors file, got an error: {error}") from error


def _adapter(folder: Path, name: str, pair: dict[str, Tensor], config: dict[str, Any]) -> LoadedAdapter:
    missing = [suffix for suffix in _FACTORS if suffix not in pair]
    if missing:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: expected {name}{missing[0]}, got only its other half")
    lora_A, lora_B = (pair[suffix] for suffix in _FACTORS)
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1] or lora_A.shape[0] < 1:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {name}: expected lora_A [R, K] and lora_B [N, R], "
            f"got {list(lora_A.shape)} and {list(lora_B.shape)}"
        )
    for suffix, tensor in pair.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{folder / WEIGHTS_FILE}: {name}{suffix}: expected finite floating-point values")
    rank = pattern_value(config.get("rank_pattern") or {}, name, config["r"])
    if rank != lora_A.shape[0]:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {name}: expected rank {rank} of {CONFIG_FILE}, got factors of {lora_A.shape[0]}"
        )
    lora_alpha = pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    return LoadedAdapter(lora_A, lora_B, float(lora_alpha), bool(config.get("use_rslora")))
