"""A whole model: put adapters in, find them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from peftk.methods.plan import Config, carrying_out, unwrapped
from peftk.nn import LoRALinear


def inject(model: nn.Module, config: Config | Sequence[Config], *, example_inputs: Any = None) -> list[str]:
    """Freezes `model` and puts a method's adapters into it, in place; several configs put in several methods.

    Outputs are unchanged: every method starts as the identity. What an earlier `inject` put in stays and goes on
    training. Returns the names of the modules that were replaced or got an adapter.

    Args:
        example_inputs: what the model's forward takes, as a mapping of named arguments, a tuple or list of several, or
            one tensor. It runs once on fake tensors of these shapes, to see which linears it calls: an adapter in one
            whose weight it reads itself (`nn.MultiheadAttention`, WavLM, Mamba) would do nothing. Models of
            transformers need none; without a run, a warning comes when the model first reads it.

    Raises:
        ValueError, TypeError: nothing matches, or what matches cannot be replaced or is never called; the model is
            unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    configs = [config] if hasattr(config, "plan") else config
    if not isinstance(configs, Sequence) or not configs or not all(hasattr(one, "plan") for one in configs):
        given = configs if isinstance(configs, Sequence) else [config]
        of_peft = next((type(one).__name__ for one in given if hasattr(one, "peft_type")), None)
        what = f"HF PEFT's {of_peft}; peftk.LoraConfig has its fields for LoRA" if of_peft else repr(config)
        raise TypeError(f"config: expected a config of peftk or a list of them, got {what}")
    with carrying_out(unwrapped(model), configs, example_inputs) as done:
        names = [name for record in done for name in (*record.layers, *record.attached)]
    return names


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The model's LoRALinear layers by name, each once."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module
