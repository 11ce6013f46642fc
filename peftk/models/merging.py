"""The adapters of a whole model into its weights and out again: all layers or none, and to the bit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from peftk.adapters import checks
from peftk.checkpoints import fitting
from peftk.checkpoints import peft as peft_checkpoint
from peftk.checkpoints.contents import named_values
from peftk.checkpoints.files import plain_name
from peftk.checkpoints.peft import LoadedAdapter
from peftk.methods.inject import lora_layers
from peftk.nn import LoRALinear, merging, shared
from peftk.nn.merging import Layers, Merge
from peftk.nn.parameters import find_optimizer
from peftk.system import interrupts
from peftk.system.lasting import lasting


def merge_adapter(model: nn.Module, *, untie: bool = False) -> None:
    """Merges every LoRALinear of an injected model that isn't merged, all in one go: `functional.merge_layers_`.

    A weight that another module of the model holds too (tied embeddings, linears with one W, overlapping views) is not
    merged into, as that would change the other module.

    Args:
        untie: where it is shared, merge into a copy of the layer's own, which the other module never sees. Unmerging
            goes back to the shared weight. transformers should be told before the merged model is saved:
            `model.config.tie_word_embeddings = False`.

    Raises:
        ValueError, TypeError: with the layer's name: W + s·BA would not be finite, a weight is shared, a lora_bias has
            no bias to go into, a weight has no memory (meta), or the model is known to read a W itself. No layer has
            changed then.
    """
    layers = [(name, layer) for name, layer in lora_layers(model) if not layer.merged]
    with _alone(model, layers, untie):
        merging.merge(layers)


def unmerge_adapter(model: nn.Module) -> None:
    """Unmerges every merged LoRALinear of an injected model, to the bit, all in one go.

    Raises ValueError, with the layer's name, where a W is not what the merge left; no layer has changed then.
    """
    merging.unmerge([(name, layer) for name, layer in lora_layers(model) if layer.merged])


@contextlib.contextmanager
def merged(model: nn.Module, *, untie: bool = False) -> Iterator[nn.Module]:
    """Inside, every LoRALinear of the model is merged; at the end, however it comes, W has its bits back.

    Layers that were merged before stay so, which makes it safe to nest. Those that are merged here are unmerged at the
    end whatever adapter they hold then (`switch_adapter`); one that somebody has unmerged meanwhile stays as it is.
    untie: as in `merge_adapter`.

    Raises:
        ValueError: as `merge_adapter`, with the model unchanged; at the end as `unmerge_adapter`, with it still merged.
    """
    layers = [(name, layer) for name, layer in lora_layers(model) if not layer.merged]
    with _alone(model, layers, untie):
        merging.merge(layers)
    try:
        yield model
    finally:
        merging.unmerge([(name, layer) for name, layer in layers if layer.merged])


def switch_adapter(
    model: nn.Module, adapters: str | os.PathLike[str] | Mapping[str, LoadedAdapter], *, untie: bool = False
) -> None:
    """From whatever the LoRALinear layers hold to these adapters, merged: one pass over each W, all layers or none.

    The layers' lora_A, lora_B, lora_bias, r and scaling become the new ones, so that `unmerge_adapter` leads to the
    base layer with the new adapter beside it, and W to the bits that it had before the first merge. On a CPU no forward
    in between sees the base layer's W (`functional.remerge_`).

    The Parameters stay, with new values. So an optimizer that holds them goes on with these, and with the momentum of
    those before; a rank that changes needs a new optimizer, after the switch.

    Args:
        adapters: the folder of a PEFT checkpoint, or what `peftk.combine` returns: one adapter for each LoRALinear of
            the model, by the layer's name, with a lora_bias where the layer has one. Ranks may differ from those
            before.
        untie: as in `merge_adapter`.

    Raises:
        CheckpointError, ValueError, TypeError: the adapters are not the model's, a W is not what its merge left, a
            merge is refused as by `merge_adapter`, or another rank would come under an optimizer. Nothing has changed
            then: layers are merged as they were, or unmerged.
    """
    layers = list(lora_layers(model))
    loaded = adapters if isinstance(adapters, Mapping) else _read(model, dict(layers), adapters)
    names = {name for name, _ in layers}
    if not layers:
        raise ValueError("model: expected LoRALinear layers (peftk.inject puts them in), got none")
    if loaded.keys() != names:
        raise ValueError(
            f"adapters: expected one for each of the model's LoRALinear layers; missing: "
            f"{sorted(names - loaded.keys())}, unknown: {sorted(loaded.keys() - names)}"
        )
    new = [_on_layer(name, layer, loaded[name]) for name, layer in layers]
    _refuse_optimized(layers, new)
    with _alone(model, layers, untie) as undo:
        for (name, layer), one in zip(layers, new, strict=True):
            _take(layer, one, loaded[name], undo)
        merging.switch(layers, new)


def _take(layer: LoRALinear, one: Merge, loaded: LoadedAdapter, undo: contextlib.ExitStack) -> None:
    """The layer's adapter becomes this one. Its Parameters stay, since an optimizer may know them."""
    for name in layer.adapter_parameters:
        parameter, value = layer._parameters[name], getattr(one, name)
        if parameter is not None:
            undo.callback(_hold, parameter, parameter.data, parameter.grad)
            _hold(parameter, value, parameter.grad if value.shape == parameter.shape else None)
    for name, value in (
        ("r", one.lora_A.shape[0]),
        ("lora_alpha", loaded.lora_alpha),
        ("use_rslora", loaded.use_rslora),
    ):
        undo.callback(setattr, layer, name, getattr(layer, name))
        setattr(layer, name, value)


def _hold(parameter: nn.Parameter, value: Tensor, grad: Tensor | None) -> None:
    parameter.grad = None  # torch takes none of another shape
    parameter.data = value
    parameter.grad = grad


def _read(
    model: nn.Module, layers: Mapping[str, LoRALinear], path: str | os.PathLike[str]
) -> Mapping[str, LoadedAdapter]:
    """The adapters of a checkpoint that fits the model's base model and its embeddings, by the layers' names."""
    checkpoint = peft_checkpoint.load_factors(path)
    fitting.check(fitting.without_layers(model, layers), checkpoint)
    values = dict(named_values(model))
    for name, layer in layers.items():
        if layer.merged and f"{plain_name(name)}.weight" in checkpoint.base:
            values[f"{plain_name(name)}.weight"] = layer.base("weight")
    fitting.same_base(checkpoint, values)
    names = {plain_name(name): name for name in layers}
    return {names.get(name, name): adapter for name, adapter in checkpoint.adapters.items()}


@lasting()
def _on_layer(name: str, layer: LoRALinear, adapter: LoadedAdapter) -> Merge:
    """Its factors where the layer is and in the dtype of the layer's own, as copies."""
    if not isinstance(adapter, LoadedAdapter):
        raise TypeError(f"adapters: expected a LoadedAdapter for {name}, got {type(adapter).__name__}")
    computed = [part for part in layer.adapter_parameters if part not in layer._parameters]
    if computed:
        raise ValueError(
            f"{name}: {computed[0]}: expected a Parameter, got one that is computed (parametrize, prune, …)"
        )
    if (adapter.lora_bias is None) != (layer.lora_bias is None):
        expected = "None, as the layer has none, got a bias" if layer.lora_bias is None else "a bias, got None"
        raise ValueError(f"{name}: lora_bias: expected {expected}")
    for part, tensor in (("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B), ("lora_bias", adapter.lora_bias)):
        if tensor is not None:
            checks.dense(f"{name}: {part}", tensor)
    like = layer.lora_A.detach()
    lora_A, lora_B, lora_bias = (
        None if t is None else torch.empty_like(t, dtype=like.dtype, device=like.device).copy_(t)
        for t in (adapter.lora_A, adapter.lora_B, adapter.lora_bias)
    )
    assert lora_A is not None and lora_B is not None  # noqa: PT018
    try:
        checks.adapter(layer.matrix, lora_A, lora_B, adapter.scaling, bias_B=lora_bias)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    return Merge(lora_A, lora_B, lora_bias, adapter.scaling)


def _refuse_optimized(layers: Layers, new: Sequence[Merge]) -> None:
    """Raises ValueError where a Parameter whose shape would change is in an optimizer, whose state has the old one."""
    names = {layer: name for name, layer in layers}
    ranks = {layer: one.lora_A.shape[0] for (_, layer), one in zip(layers, new, strict=True)}
    found = find_optimizer((layer for layer, rank in ranks.items() if rank != layer.r), ("lora_A", "lora_B"))
    if found is not None:
        layer, optimizer = cast(LoRALinear, found[0]), type(found[1]).__name__
        raise ValueError(
            f"{names[layer]}: r: expected {layer.r} as before, as {optimizer} holds the Parameters and has state of "
            f"their shape, got {ranks[layer]}; delete the optimizer (and its scheduler) first, make a new one after "
            "the switch"
        )


@contextlib.contextmanager
def _alone(model: nn.Module, layers: Layers, untie: bool) -> Iterator[contextlib.ExitStack]:
    """Inside, nobody else holds what merging the layers changes. Raises ValueError where somebody does, if not `untie`.

    Where what is done inside fails, what has been untied is shared again, and what else the stack holds is undone.
    """
    with interrupts.deferred(), contextlib.ExitStack() as undo:
        for place, other in shared.conflicts(model, merging.places(layers)):
            if not untie:
                raise ValueError(f"{place.layer}: {shared.shared_memory_error(place.name, other)}")
            merging.untie(cast(LoRALinear, place.module), place.name, undo)
        yield undo
        undo.pop_all()
