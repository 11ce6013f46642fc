"""A whole model: put adapters in, merge."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from torch import nn

from peftk import functional
from peftk.methods.plan import Config, carry_out
from peftk.nn import LoRALinear


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


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The model's LoRALinear layers by name, each once."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


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
