"""A whole model: put adapters in, freeze, count, save and load."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from peftk import functional
from peftk.interop import peft_checkpoint
from peftk.interop.peft_checkpoint import CheckpointError
from peftk.methods.plan import Config, carry_out
from peftk.nn import LoRALinear
from peftk.nn.replace import is_linear


def inject(model: nn.Module, config: Config | Sequence[Config]) -> list[str]:
    """Freezes `model` and puts a method's adapters into it, in place; several configs put in several methods.

    Outputs are unchanged: every method starts as the identity. What an earlier `inject` put in stays and goes on
    training. Returns the names of the modules that were replaced or got an adapter.

    Raises:
        ValueError, TypeError: nothing matches, or what matches cannot be replaced; the model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    configs = [config] if hasattr(config, "plan") else config
    if not isinstance(configs, Sequence) or not configs or not all(hasattr(one, "plan") for one in configs):
        raise TypeError(f"config: expected a config of peftk or a list of them, got {config!r}")
    done = carry_out(model, configs)
    return [name for record in done for name in (*record.layers, *record.attached)]


class ParameterCount(NamedTuple):
    """|Φ| parameters are trained, of |Θ| in all (adapters included); ratio = |Φ|/|Θ|."""

    trainable: int
    total: int

    @property
    def ratio(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"|Φ| = {self.trainable:,} trainable of |Θ| = {self.total:,} parameters ({100 * self.ratio:.3f} %)"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts each parameter once, however many modules share it."""
    parameters = list(model.parameters())
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad), total=sum(p.numel() for p in parameters)
    )


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The model's LoRALinear layers by name, each once."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


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


def merge_adapter(model: nn.Module) -> None:
    """Merges every LoRALinear of an injected model that isn't merged, all in one go: `functional.merge_layers_`.

    Raises ValueError, with the layer's name, where a W + s·BA would not be finite; no layer has changed then.
    """
    layers = [(name, layer) for name, layer in lora_layers(model) if not layer.merged]
    with _named(layers):
        receipts = functional.merge_layers_(
            [layer.matrix.detach() for _, layer in layers],
            [layer.lora_A for _, layer in layers],
            [layer.lora_B for _, layer in layers],
            [layer.scaling for _, layer in layers],
        )
    for (_, layer), receipt in zip(layers, receipts, strict=True):
        layer.receipt = receipt


def unmerge_adapter(model: nn.Module) -> None:
    """Unmerges every merged LoRALinear of an injected model, to the bit, all in one go.

    Raises ValueError, with the layer's name, where a W is not what the merge left; no layer has changed then.
    """
    layers = [(name, layer) for name, layer in lora_layers(model) if layer.receipt is not None]
    weights = [layer.matrix.detach() for _, layer in layers]
    receipts = [layer.receipt.to(layer.weight.device) for _, layer in layers if layer.receipt is not None]
    with _named(layers):
        functional.unmerge_layers_(weights, receipts)
    for _, layer in layers:
        layer.receipt = None


@contextlib.contextmanager
def _named(layers: Sequence[tuple[str, LoRALinear]]) -> Iterator[None]:
    """An error that names a layer of the list by its number names it by its name instead."""
    try:
        yield
    except (TypeError, ValueError) as error:
        number = re.match(r"layer (\d+): ", str(error))
        if number is None:
            raise
        raise type(error)(f"{layers[int(number[1])][0]}: {str(error)[number.end() :]}") from None
