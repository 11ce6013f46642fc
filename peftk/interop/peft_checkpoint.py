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
import torch
from torch import Tensor

from peftk import checks
from peftk.methods.targets import pattern_value

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
    folder = _folder(path)
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
    folder = _folder(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path: expected a folder, got the file {folder}")
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


def _folder(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected the path of a folder, got {path!r}")
    return Path(path)


def scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """s = lora_alpha / r, or lora_alpha / √r for rsLoRA (dimensionless)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder}: expected a folder with {CONFIG_FILE}, got none there")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected JSON, got an error: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{file}: expected peft_type 'LORA', got {kind!r}")
    for field in ("r", "lora_alpha"):
        value = config.get(field)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(f"{file}: expected {field} to be a finite number, got {value!r}")
    unsupported = {field: value for field, value in config.items() if value and not _is_plain(field, value)}
    if unsupported:
        found = ", ".join(f"{field}={value!r}" for field, value in sorted(unsupported.items()))
        raise CheckpointError(f"{file}: expected a LoRA that is s·BA alone, got {found}")
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        try:
            numbers = [float(value) for key, value in pattern.items() if re.compile(key)]
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise CheckpointError(f"{file}: expected {field} to map patterns to numbers, got {pattern!r}") from error
        if not all(math.isfinite(number) for number in numbers):
            raise CheckpointError(f"{file}: expected finite numbers in {field}, got {pattern!r}")
    return config


# What a field of the config may hold without changing what s·BA computes. Fields that are not here must be empty.
_PLAIN_FIELDS = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
# These change the base model's weights too, when PEFT loads the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _is_plain(field: str, value: Any) -> bool:
    if field == "bias":
        return bool(value == "none")
    if field == "init_lora_weights":
        return not (isinstance(value, str) and value.lower().startswith(_CHANGES_BASE))
    return field in _PLAIN_FIELDS


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
        if tensor.dtype not in checks.FLOATS or not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: {name}{suffix}: expected finite values in fp32, bf16 or fp16, "
                f"got {tensor.dtype}"
            )
    rank = pattern_value(config.get("rank_pattern") or {}, name, config["r"])
    if rank != lora_A.shape[0]:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {name}: expected rank {rank} of {CONFIG_FILE}, got factors of {lora_A.shape[0]}"
        )
    lora_alpha = pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    adapter = LoadedAdapter(lora_A, lora_B, float(lora_alpha), bool(config.get("use_rslora")))
    if not abs(adapter.scaling) <= torch.finfo(torch.float32).max:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: {name}: expected a scaling that fp32 holds, got {adapter.scaling}"
        )
    return adapter
