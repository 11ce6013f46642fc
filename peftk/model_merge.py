"""The adapters of a whole model into its weights and out again: all layers or none, and to the bit."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from peftk import checks, functional, interrupts
from peftk.interop import fitting, peft_checkpoint
from peftk.interop.peft_checkpoint import LoadedAdapter
from peftk.lasting import lasting
from peftk.model import lora_layers
from peftk.nn import LoRALinear
from peftk.nn.watched import mergeable

Layers = Sequence[tuple[str, LoRALinear]]


def merge_adapter(model: nn.Module) -> None:
    """Merges every LoRALinear of an injected model that isn't merged, all in one go: `functional.merge_layers_`.

    Raises ValueError, with the layer's name, where a W + s·BA would not be finite, or the model is known to read a W
    itself; no layer has changed then.
    """
    _merge([(name, layer) for name, layer in lora_layers(model) if not layer.merged])


def unmerge_adapter(model: nn.Module) -> None:
    """Unmerges every merged LoRALinear of an injected model, to the bit, all in one go.

    Raises ValueError, with the layer's name, where a W is not what the merge left; no layer has changed then.
    """
    _unmerge(list(lora_layers(model)))


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, every LoRALinear of the model is merged; at the end, however it comes, W has its bits back.

    Layers that were merged before stay so, which makes it safe to nest. Those that are merged here are unmerged at the
    end whatever adapter they hold then (`switch_adapter`); one that somebody has unmerged meanwhile stays as it is.

    Raises:
        ValueError: as `merge_adapter`, with the model unchanged; at the end as `unmerge_adapter`, with it still merged.
    """
    layers = [(name, layer) for name, layer in lora_layers(model) if not layer.merged]
    _merge(layers)
    try:
        yield model
    finally:
        _unmerge(layers)


def switch_adapter(model: nn.Module, adapters: str | os.PathLike[str] | Mapping[str, LoadedAdapter]) -> None:
    """From whatever the LoRALinear layers hold to these adapters, merged: one pass over each W, all layers or none.

    The layers' lora_A, lora_B, r and scaling become the new ones, so that `unmerge_adapter` leads to the base layer
    with the new adapter beside it, and W to the bits that it had before the first merge. On a CPU no forward in between
    sees the base layer's W (`functional.remerge_`).

    Args:
        adapters: the folder of a PEFT checkpoint, or what `peftk.combine` returns: one adapter for each LoRALinear of
            the model, by the layer's name. Ranks may differ from those before.

    Raises:
        CheckpointError, ValueError, TypeError: the adapters are not the model's, a W is not what its merge left, or a
            W + s·BA would not be finite. Nothing has changed then: layers are merged as they were, or unmerged.
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
    factors = [_on_layer(name, layer, loaded[name]) for name, layer in layers]
    receipts = [None if layer.receipt is None else layer.receipt.to(layer.weight.device) for _, layer in layers]
    with interrupts.held():
        with _named(layers):
            new = functional.remerge_layers_(
                [layer.matrix.detach() for _, layer in layers],
                receipts,
                [lora_A for lora_A, _ in factors],
                [lora_B for _, lora_B in factors],
                [loaded[name].scaling for name, _ in layers],
            )
        for (name, layer), (lora_A, lora_B), receipt in zip(layers, factors, new, strict=True):
            if lora_A.shape != layer.lora_A.shape:
                layer.lora_A.grad = layer.lora_B.grad = None
            layer.lora_A.data, layer.lora_B.data = lora_A, lora_B  # the Parameters stay: an optimizer may know them
            layer.r, layer.lora_alpha = lora_A.shape[0], loaded[name].lora_alpha
            layer.use_rslora = loaded[name].use_rslora
            layer.receipt = receipt


def _mergeable(name: str, layer: LoRALinear) -> None:
    try:
        mergeable(layer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _read(
    model: nn.Module, layers: Mapping[str, LoRALinear], path: str | os.PathLike[str]
) -> Mapping[str, LoadedAdapter]:
    """The adapters of a checkpoint that fits the model's base model and its embeddings."""
    checkpoint = peft_checkpoint.load_factors(path)
    fitting.check(fitting.without_layers(model, layers), checkpoint)
    values = dict(fitting.named_values(model))
    for name, layer in layers.items():
        if layer.merged and f"{name}.weight" in checkpoint.base:
            values[f"{name}.weight"] = layer.base_weight()
    fitting.same_base(checkpoint, values)
    return checkpoint.adapters


@lasting()
def _on_layer(name: str, layer: LoRALinear, adapter: LoadedAdapter) -> tuple[Tensor, Tensor]:
    """Its factors where the layer is and in the dtype of the layer's own, as copies."""
    _mergeable(name, layer)
    if not isinstance(adapter, LoadedAdapter):
        raise TypeError(f"adapters: expected a LoadedAdapter for {name}, got {type(adapter).__name__}")
    if adapter.lora_bias is not None:
        raise ValueError(f"{name}: lora_bias: expected None, which is all that W can take in, got a bias")
    like = layer.lora_A.detach()
    lora_A, lora_B = (torch.empty_like(t, dtype=like.dtype, device=like.device).copy_(t) for t in adapter[:2])
    try:
        checks.adapter(layer.matrix.detach(), lora_A, lora_B, adapter.scaling)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    return lora_A, lora_B


def _merge(layers: Layers) -> None:
    for name, layer in layers:
        _mergeable(name, layer)
    with interrupts.held():  # a merged W and its receipt are not to be parted
        with _named(layers):
            receipts = functional.merge_layers_(
                [layer.matrix.detach() for _, layer in layers],
                [layer.lora_A for _, layer in layers],
                [layer.lora_B for _, layer in layers],
                [layer.scaling for _, layer in layers],
            )
        for (_, layer), receipt in zip(layers, receipts, strict=True):
            layer.receipt = receipt


def _unmerge(layers: Layers) -> None:
    """Those of them that are merged."""
    layers = [(name, layer) for name, layer in layers if layer.merged]
    receipts = [layer.receipt.to(layer.weight.device) for _, layer in layers if layer.receipt is not None]
    with interrupts.held():
        with _named(layers):
            functional.unmerge_layers_([layer.matrix.detach() for _, layer in layers], receipts)
        for _, layer in layers:
            layer.receipt = None


@contextlib.contextmanager
def _named(layers: Layers) -> Iterator[None]:
    """An error that names a layer of the list by its number names it by its name instead."""
    try:
        yield
    except (TypeError, ValueError) as error:
        number = re.match(r"layer (\d+): ", str(error))
        if number is None:
            raise
        raise type(error)(f"{layers[int(number[1])][0]}: {str(error)[number.end() :]}") from None
