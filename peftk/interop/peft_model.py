"""A live HF PEFT model on peftk's kernels: `peftk.accelerate`, and back: `peftk.decelerate`."""

from __future__ import annotations

import sys
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def accelerate(peft_model: Model) -> Model:
    """Makes every LoRA Linear of a live HF PEFT model run on peftk's kernels, in place; returns the same object.

        y = xWᵀ + b + Σ s·(dropout(x) Aᵀ) Bᵀ      one operation, rounded once (`peftk.functional.lora_linear`)

    PEFT's API stays PEFT's own: layers change their class and nothing else, to subclasses of PEFT's that override
    forward, merge and unmerge. Parameters, names, state_dict, hooks, optimizers that hold parameters: all as they were.
    What is new: `adapter_names=` is one call a layer and trains; unmerge gives back every bit. Layers that PEFT adds
    later are accelerated too. What peftk has no kernels for (DoRA and other variants, quantized base layers, hooks on
    a base layer, …) keeps PEFT's code: `peftk.explain(peft_model)` says which and why.

    Args:
        peft_model: what `get_peft_model` or `PeftModel.from_pretrained` returned, or any module with LoRA layers of
            PEFT inside. A second call changes nothing.

    Raises:
        TypeError: not an nn.Module. ValueError: it has no LoRA layers of PEFT. Nothing has changed then.
    """
    if not isinstance(peft_model, nn.Module):
        raise TypeError(f"peft_model: expected an nn.Module, got {type(peft_model).__name__}")
    if not _layers_of_peft(peft_model):
        raise ValueError(f"peft_model: expected LoRA layers of HF PEFT, got {type(peft_model).__name__} without")
    from peftk.interop import peft_layers

    peft_layers.swap(peft_model)
    return peft_model


def decelerate(peft_model: Model) -> Model:
    """Undoes `accelerate`, in place: every module has PEFT's own class again. Returns the same object.

    Raises:
        TypeError: not an nn.Module. ValueError: it was not accelerated; or layers are merged, which PEFT could not
            unmerge exactly. Nothing has changed then.
    """
    if not isinstance(peft_model, nn.Module):
        raise TypeError(f"peft_model: expected an nn.Module, got {type(peft_model).__name__}")
    if not is_accelerated(peft_model):
        raise ValueError(f"peft_model: expected an accelerated model, got {type(peft_model).__name__} that is not")
    from peftk.interop import peft_layers

    peft_layers.swap_back(peft_model)
    return peft_model


def is_accelerated(model: nn.Module) -> bool:
    """Whether any module in `model` has a class of ours."""
    layers = sys.modules.get("peftk.interop.peft_layers")
    return layers is not None and any(type(m) in (layers.Linear, layers.LoraModel) for m in model.modules())


def _layers_of_peft(model: nn.Module) -> bool:
    """Whether any module is LoRA's of PEFT, which is not imported where nobody has imported it."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    return layer is not None and any(isinstance(module, layer.LoraLayer) for module in model.modules())
