"""Merges a whole model's adapters into its weights, switches them, and unmerges bit for bit: all layers or none."""

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
    """Merges every LoRALinear of an injected model that is not merged yet, all together: W ← W + s·BA.

    A weight that another module of the model holds too (tied embeddings, linears with one W, overlapping views) is not
    merged into, as that would change the other module. Rounding and bounds: `peftk.functional.merge_layers_`.

    Args:
        untie: if a weight is shared, merge into a copy for the layer alone. Unmerging goes back to the shared weight.
            Before you save the merged model, tell transformers: `model.config.tie_word_embeddings = False`.

    Raises:
        ValueError, TypeError: with the layer's name: W + s·BA would not be finite, a weight is shared, a lora_bias has
            no bias to be added to, a weight has no memory (meta), or another module is known to compute with a W. No
            layer has changed then.
    """
    layers = [(name, layer) for name, layer in lora_layers(model) if not layer.merged]
    with _unshared(model, layers, untie):
        merging.merge(layers)


def unmerge_adapter(model: nn.Module) -> None:
    """Unmerges every merged LoRALinear of an injected model, all together; every W gets its earlier bits back.

    Raises ValueError, with the layer's name, if the bits of a W have changed since the merge; no layer has changed
    then.
    """
    merging.unmerge([(name, layer) for name, layer in lora_layers(model) if layer.merged])


@contextlib.contextmanager
def merged(model: nn.Module, *, untie: bool = False) -> Iterator[nn.Module]:
    """A context manager that merges every LoRALinear of the model inside, and restores every W bit for bit at the end.

    Layers that were merged before stay merged, so it can be nested. Layers that were merged here are unmerged at the
    end, even after an exception, and whatever adapter they hold then (`switch_adapter`). A layer that was unmerged
    inside is left as it is. untie: as in `merge_adapter`.

    Raises:
        ValueError, TypeError: at the start as `merge_adapter`, with the model unchanged; at the end as
            `unmerge_adapter`, with the model still merged.
    """
    layers = [(name, layer) for name, layer in lora_layers(model) if not layer.merged]
    with _unshared(model, layers, untie):
        merging.merge(layers)
    try:
        yield model
    finally:
        merging.unmerge([(name, layer) for name, layer in layers if layer.merged])


def switch_adapter(
    model: nn.Module, adapters: str | os.PathLike[str] | Mapping[str, LoadedAdapter], *, untie: bool = False
) -> None:
    """Replaces the adapters of all LoRALinear layers by new ones, merged: all layers or none.

    On a CPU in one pass over each W. On a GPU a merged W goes through a copy: unmerged, merged again, written back.

    It does not matter whether the layers are merged. Their lora_A, lora_B, lora_bias, r and scaling become the new
    ones, so after `unmerge_adapter` the layers have the new adapters unmerged, and every W the bits that it had before
    the first merge. On a CPU, no forward in between sees the base layer's W (`peftk.functional.remerge_`).

    The Parameters stay the same objects, with new values. An optimizer that holds them goes on with the new values and
    the old momentum. If a rank changes, make a new optimizer after the switch.

    Args:
        adapters: the folder of a PEFT checkpoint, or the result of `peftk.combine_checkpoints`: one adapter for each
            LoRALinear of the model, by the layer's name, with a lora_bias if the layer has one. Ranks may differ from
            the present ones.
        untie: as in `merge_adapter`.

    Raises:
        CheckpointError, ValueError, TypeError: the adapters do not fit the model, the bits of a W have changed since
            its merge, a merge is refused as by `merge_adapter`, or an optimizer holds a Parameter whose rank would
            change. Nothing has changed then.
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
    new = [_to_layer(name, layer, loaded[name]) for name, layer in layers]
    _check_optimizers(layers, new)
    with _unshared(model, layers, untie) as undo:
        for (name, layer), merge in zip(layers, new, strict=True):
            _set_adapter(layer, merge, loaded[name], undo)
        merging.switch(layers, new)


def _set_adapter(layer: LoRALinear, merge: Merge, loaded: LoadedAdapter, undo: contextlib.ExitStack) -> None:
    """Sets the layer's adapter. The Parameters stay the same objects, since an optimizer may hold them."""
    for name in layer.adapter_parameters:
        parameter, value = layer._parameters[name], getattr(merge, name)
        if parameter is not None:
            undo.callback(_set_data, parameter, parameter.data, parameter.grad)
            _set_data(parameter, value, parameter.grad if value.shape == parameter.shape else None)
    for name, value in (
        ("r", merge.lora_A.shape[0]),
        ("lora_alpha", loaded.lora_alpha),
        ("use_rslora", loaded.use_rslora),
    ):
        undo.callback(setattr, layer, name, getattr(layer, name))
        setattr(layer, name, value)


def _set_data(parameter: nn.Parameter, value: Tensor, grad: Tensor | None) -> None:
    parameter.grad = None  # torch refuses data whose shape differs from the gradient's
    parameter.data = value
    parameter.grad = grad


def _read(
    model: nn.Module, layers: Mapping[str, LoRALinear], path: str | os.PathLike[str]
) -> Mapping[str, LoadedAdapter]:
    """The adapters of a checkpoint by the layers' names. Raises CheckpointError if it does not fit the base model."""
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
def _to_layer(name: str, layer: LoRALinear, adapter: LoadedAdapter) -> Merge:
    """The adapter's tensors copied to the device and dtype of the layer's adapter."""
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


def _check_optimizers(layers: Layers, new: Sequence[Merge]) -> None:
    """Raises ValueError if an optimizer holds a Parameter whose shape would change: its state has the old shape."""
    names = {layer: name for name, layer in layers}
    ranks = {layer: merge.lora_A.shape[0] for (_, layer), merge in zip(layers, new, strict=True)}
    found = find_optimizer((layer for layer, rank in ranks.items() if rank != layer.r), ("lora_A", "lora_B"))
    if found is not None:
        layer, optimizer = cast(LoRALinear, found[0]), type(found[1]).__name__
        raise ValueError(
            f"{names[layer]}: r: expected {layer.r} as before, as {optimizer} holds the Parameters and has state of "
            f"their shape, got {ranks[layer]}; delete the optimizer (and its scheduler) first, make a new one after "
            "the switch"
        )


@contextlib.contextmanager
def _unshared(model: nn.Module, layers: Layers, untie: bool) -> Iterator[contextlib.ExitStack]:
    """A context manager: inside, no other module holds what merging the layers changes.

    With `untie` the layers get copies for that; without, ValueError is raised if something is shared. If the block
    fails, the copies are given up again, and everything else on the stack is undone.
    """
    with interrupts.deferred(), contextlib.ExitStack() as undo:
        for place, other in shared.conflicts(model, merging.places(layers)):
            if not untie:
                raise ValueError(f"{place.layer}: {shared.shared_memory_error(place.name, other)}")
            merging.untie(cast(LoRALinear, place.module), place.name, undo)
        yield undo
        undo.pop_all()
