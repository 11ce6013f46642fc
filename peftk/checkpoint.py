"""The adapters of an injected model, to and from files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftk.interop import peft_checkpoint
from peftk.interop.peft_checkpoint import CheckpointError
from peftk.model import lora_layers
from peftk.nn import LoRALinear
from peftk.nn.replace import is_linear


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the adapters of an injected model as a checkpoint that HF PEFT, and `MultiAdapter.load`, read.

    Raises ValueError where the model holds no LoRALinear. A failure leaves an earlier checkpoint as it was.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model: expected LoRALinear layers (peftk.inject puts them in), got none")
    first = next(iter(layers.values()))
    use_rslora = first.use_rslora
    alphas = {name: layer.lora_alpha for name, layer in layers.items()}
    if any(layer.use_rslora != use_rslora for layer in layers.values()):
        # the format has one flag for all layers: say the same scalings without it
        use_rslora, alphas = False, {name: layer.scaling * layer.r for name, layer in layers.items()}
    alpha = next(iter(alphas.values()))
    config: dict[str, Any] = {
        "r": first.r,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": use_rslora,
        "target_modules": _target_modules(model, layers),
        "rank_pattern": {f"^{re.escape(n)}": layer.r for n, layer in layers.items() if layer.r != first.r},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "task_type": None,
        "inference_mode": True,
    }
    peft_checkpoint.save(path, {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}, config)


def _target_modules(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str] | str:
    """The layers' names for a PEFT config; a regular expression where a name alone would match other modules too."""
    others = [n for n, m in model.named_modules() if is_linear(m) and n not in layers]
    if any(other.endswith(f".{name}") for other in others for name in layers):
        return "|".join(re.escape(name) for name in sorted(layers))
    return sorted(layers)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a checkpoint into the LoRALinear layers of an injected model: factors, lora_alpha and use_rslora.

    Raises CheckpointError where it does not fit the model layer by layer, ValueError where a layer is merged; the model
    is unchanged then.
    """
    loaded = peft_checkpoint.load(path)
    layers = dict(lora_layers(model))
    if loaded.keys() != layers.keys():
        raise CheckpointError(
            f"{path}: expected adapters for exactly the model's LoRALinear layers; missing there: "
            f"{sorted(layers.keys() - loaded.keys())}, unknown here: {sorted(loaded.keys() - layers.keys())}"
        )
    for name, layer in layers.items():
        adapter = loaded[name]
        if layer.merged:
            raise ValueError(f"model: expected {name} to be unmerged before its adapter changes, got a merged layer")
        if adapter.lora_A.shape != layer.lora_A.shape or adapter.lora_B.shape != layer.lora_B.shape:
            raise CheckpointError(
                f"{path}: {name}: expected factors {list(layer.lora_A.shape)} and {list(layer.lora_B.shape)}, "
                f"got {list(adapter.lora_A.shape)} and {list(adapter.lora_B.shape)}"
            )
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(loaded[name].lora_A)
            layer.lora_B.copy_(loaded[name].lora_B)
            layer.lora_alpha, layer.use_rslora = loaded[name].lora_alpha, loaded[name].use_rslora
