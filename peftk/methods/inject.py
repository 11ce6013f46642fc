"""`inject` puts the adapters of one or several methods into a model; `lora_layers` finds LoRALinear layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from peftk.methods.plan import Config, apply_configs, unwrapped
from peftk.nn import LoRALinear


def inject(model: nn.Module, config: Config | Sequence[Config], *, example_inputs: Any = None) -> list[str]:
    """Freezes `model` and puts a method's adapters into it, in place. Several configs put in several methods.

    Outputs are unchanged, as every method starts as the identity. Adapters of an earlier `inject` stay and go on
    training.

    Args:
        model: an nn.Module.
        config: `peftk.LoraConfig` or the config of another method, or a sequence of them.
        example_inputs: arguments for the model's forward: a mapping of named arguments, a tuple or list of several, or
            a single tensor. The forward runs once on fake tensors of these shapes, to see which linears it calls. An
            adapter in a linear whose weight the model reads itself instead (`nn.MultiheadAttention`, WavLM, Mamba)
            would do nothing. Models of transformers need no example_inputs. Without a run, there is a warning when the
            model first computes with such a weight.

    Returns:
        The names of the modules that were replaced or got an adapter.

    Raises:
        ValueError, TypeError: nothing matches, or a match cannot be replaced or is never called. The model is unchanged
            then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    configs = [config] if hasattr(config, "plan") else config
    if not isinstance(configs, Sequence) or not configs or not all(hasattr(each, "plan") for each in configs):
        passed = configs if isinstance(configs, Sequence) else [config]
        of_peft = next((type(each).__name__ for each in passed if hasattr(each, "peft_type")), None)
        got = f"HF PEFT's {of_peft}; peftk.LoraConfig has its fields for LoRA" if of_peft else repr(config)
        raise TypeError(f"config: expected a config of peftk or a list of them, got {got}")
    with apply_configs(unwrapped(model), configs, example_inputs) as done:
        names = [name for record in done for name in (*record.layers, *record.attached)]
    return names


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The model's LoRALinear layers with their names, each once."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module
