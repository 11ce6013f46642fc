"""`peftk.accelerate` puts a live HF PEFT model on peftk's kernels; `peftk.decelerate` undoes that."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from peftk.backends import choice
from peftk.backends.call import LORA_LINEAR, Call, Choice
from peftk.methods import trial
from peftk.nn import watched
from peftk.system import autocast

Model = TypeVar("Model", bound=nn.Module)


def accelerate(peft_model: Model) -> Model:
    """Makes every LoRA Linear of a live HF PEFT model run on peftk's kernels, in place.

        y = xWᵀ + b + Σ s·(dropout(x) Aᵀ) Bᵀ      one operation, rounded once (`peftk.functional.lora_linear`)

    PEFT's API does not change: the layers get subclasses of PEFT's classes that override forward, merge and unmerge.
    Parameters, names, state_dict, hooks, and optimizers that hold parameters stay as they were. New are: with
    `adapter_names=`, a mixed batch is one call per layer and can train; and unmerge restores every bit. Layers that
    PEFT adds later are accelerated too. Layers for which peftk has no kernels (DoRA and other variants, quantized base
    layers, hooks on a base layer, …) keep PEFT's code; `peftk.explain(peft_model)` says which and why.

    A warning names layers whose weight the model reads itself: PEFT's adapter does nothing there.

    Args:
        peft_model: the result of `get_peft_model` or `PeftModel.from_pretrained`, or any module that contains PEFT's
            LoRA layers. A second call changes nothing.

    Returns:
        The same object.

    Raises:
        TypeError: not an nn.Module. ValueError: there are no LoRA layers of PEFT in it. Nothing has changed then.
    """
    if not isinstance(peft_model, nn.Module):
        raise TypeError(f"peft_model: expected an nn.Module, got {type(peft_model).__name__}")
    if not has_lora(peft_model):
        raise ValueError(f"peft_model: expected LoRA layers of HF PEFT, got {type(peft_model).__name__} without")
    from peftk.interop import peft_layers, peft_merge
    from peftk.interop.peft_whole import all_or_none

    with all_or_none(peft_model):
        peft_layers.swap(peft_model)
        peft_merge.note_shared(peft_layers.wrapped_model(peft_model))
        layers = {name: module for name, module in peft_model.named_modules() if type(module) is peft_layers.Linear}
        new = {name: layer for name, layer in layers.items() if not watched.is_watched(layer)}
        if new:
            found = trial.run(peft_model, layers=set(new.values()))
            for name, layer in new.items():
                watched.watch(layer, name, found.read.get(name))
    return peft_model


def decelerate(peft_model: Model) -> Model:
    """Undoes `accelerate`, in place: every module gets PEFT's own class back. Returns the same object.

    Raises:
        TypeError: not an nn.Module. ValueError: it was not accelerated, or layers are merged, which PEFT could not
            unmerge exactly. Nothing has changed then.
    """
    if not isinstance(peft_model, nn.Module):
        raise TypeError(f"peft_model: expected an nn.Module, got {type(peft_model).__name__}")
    if not is_accelerated(peft_model):
        raise ValueError(f"peft_model: expected an accelerated model, got {type(peft_model).__name__} that is not")
    from peftk.interop import peft_layers
    from peftk.interop.peft_whole import all_or_none

    with all_or_none(peft_model):
        peft_layers.swap_back(peft_model)
    return peft_model


def is_accelerated(model: nn.Module) -> bool:
    """Whether any module in `model` has a class of ours."""
    layers = sys.modules.get("peftk.interop.peft_layers")
    return layers is not None and any(type(m) in (layers.Linear, layers.LoraModel) for m in model.modules())


def has_lora(model: nn.Module) -> bool:
    """Whether any module is a LoRA layer of PEFT. Does not import peft."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    return layer is not None and any(isinstance(module, layer.LoraLayer) for module in model.modules())


class Explanation(NamedTuple):
    """What runs each layer. peftk: kernel → names of layers. peft: reason why PEFT's code runs → names of layers."""

    peftk: dict[str, list[str]]
    peft: dict[str, list[str]]

    def __str__(self) -> str:
        lines = []
        for title, groups in (("on peftk's kernels", self.peftk), ("on PEFT's own code", self.peft)):
            lines.append(f"{sum(map(len, groups.values()))} layers {title}")
            lines += [
                f"  {len(names)}: {why}   ({names[0]}{', …' if names[1:] else ''})" for why, names in groups.items()
            ]
        return "\n".join(lines)


def explain(model: nn.Module, M: int, backend: str | None) -> Choice | Explanation:
    """For `peftk.explain`: the Choice of one layer, or the Explanation of all layers of a model. M: rows of x."""
    from peft.tuners.lora import LoraLayer

    from peftk.interop.peft_layers import Linear

    if isinstance(model, LoraLayer):
        return _choice(model, M, backend)
    explanation = Explanation({}, {})
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            chosen = _choice(module, M, backend)
            if chosen.backend == "peft":
                explanation.peft.setdefault(chosen.reason, []).append(name)
            else:
                assert type(module) is Linear
                explanation.peftk.setdefault(f"{chosen.backend}: {chosen.kernel}", []).append(name)
    return explanation


def _choice(layer: Any, M: int, backend: str | None) -> Choice:
    """What would run a call of the layer as it is now, without a mixed batch."""
    from peft.tuners import lora

    from peftk.interop.peft_layers import Linear

    if type(layer) is not Linear:
        kind = type(layer).__name__
        return Choice("peft", f"not accelerated: lora.{kind}" if type(layer) is lora.Linear else f"lora.{kind}", ())
    reader = watched.reader_of(layer)
    if reader is not None:
        return Choice("peft", f"{reader} computes with the weight itself, where the adapter does nothing", ())
    found = layer.active()
    if isinstance(found, str):
        return Choice("peft", found, ())
    weight, adapters = found
    dtype: torch.dtype | None = adapters[0].lora_A.dtype if len(adapters) == 1 else torch.float32 if adapters else None
    rank, dropout = sum(a.lora_A.shape[0] for a in adapters), any(a.dropout_p for a in adapters)
    N, K = weight.shape
    base_dtype = autocast.dtype_for(weight.device, weight.dtype) or weight.dtype
    call = Call(
        op=LORA_LINEAR,
        device=weight.device.type,
        x_dtype=base_dtype,
        weight_dtype=base_dtype,
        adapter_dtype=dtype,
        M=M,
        K=K,
        N=N,
        rank=rank,
        adapters=len(adapters[:1]),
        dropout=dropout,
    )
    return choice.choose_and_describe(call, backend)
