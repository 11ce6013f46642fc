"""Merges the adapters of LoRALinear layers into their weights, and unmerges them: all layers of a call, or none.

A merged layer holds W + s·BA and bias + s·b, and `receipt` and `bias_receipt`, from which both are restored.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from peftk import functional
from peftk.adapters import checks
from peftk.launch.merge_args import write
from peftk.nn import shared
from peftk.nn.parameters import param
from peftk.nn.shared import Place
from peftk.nn.watched import check_mergeable
from peftk.reference.receipt import BiasReceipt, merge_bias
from peftk.system import interrupts

if TYPE_CHECKING:
    from peftk.nn.lora_linear import LoRALinear

Layers = Sequence[tuple[str, "LoRALinear"]]  # (name in the model, layer); "" for a layer outside of a model


class Merge(NamedTuple):
    """What is merged into a layer: s·BA into the weight, s·b into the bias."""

    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    scaling: float


def parts(layer: LoRALinear) -> tuple[str, ...]:
    """The names of the Parameters of a layer that its merge changes."""
    return ("weight",) if layer.lora_bias is None else ("weight", "bias")


def places(layers: Layers) -> list[Place]:
    return [Place(name, layer, layer, part) for name, layer in layers for part in parts(layer)]


def merge(layers: Layers) -> None:
    """Merges each layer's own adapter. None of the layers may be merged yet."""
    switch(layers, [Merge(layer.lora_A, layer.lora_B, layer.lora_bias, layer.scaling) for _, layer in layers])


def switch(layers: Layers, merges: Sequence[Merge]) -> None:
    """Replaces what is merged into each layer, if anything, by `merges`. The layers' lora_A and so on do not change."""
    biases: list[BiasReceipt | None] = []
    with interrupts.deferred(), contextlib.ExitStack() as undo:  # no interrupt between a merged W and its receipt
        for (name, layer), new in zip(layers, merges, strict=True):
            with _prefix_errors(name):
                check_mergeable(layer)
                _check_parameters(layer)
                if new.lora_bias is not None:
                    checks.dense("lora_bias", new.lora_bias)
                biases.append(None if new.lora_bias is None else _merged_bias(layer, new.lora_bias, new.scaling))
        for (_, layer), bias in zip(layers, biases, strict=True):
            if bias is not None:
                _set_bias(layer, bias.after, undo)
        with _name_layers_in_errors(layers):
            receipts = functional.remerge_layers_(
                [layer.matrix.detach() for _, layer in layers],
                [None if layer.receipt is None else layer.receipt.to(layer.weight.device) for _, layer in layers],
                [new.lora_A for new in merges],
                [new.lora_B for new in merges],
                [new.scaling for new in merges],
            )
        for (_, layer), receipt, bias in zip(layers, receipts, biases, strict=True):
            layer.receipt, layer.bias_receipt = receipt, bias
        undo.pop_all()


def unmerge(layers: Layers) -> None:
    """Unmerges layers, all of which are merged. A Parameter that a merge untied is shared again if its bits match."""
    biases: list[BiasReceipt | None] = []
    with interrupts.deferred(), contextlib.ExitStack() as undo:
        for name, layer in layers:
            with _prefix_errors(name):
                _check_parameters(layer)
                biases.append(_bias_receipt(layer))
        for (_, layer), bias in zip(layers, biases, strict=True):
            if bias is not None:
                _set_bias(layer, bias.before, undo)
        with _name_layers_in_errors(layers):
            functional.unmerge_layers_(
                [layer.matrix.detach() for _, layer in layers],
                [layer.receipt.to(layer.weight.device) for _, layer in layers if layer.receipt is not None],
            )
        for _, layer in layers:
            layer.receipt = layer.bias_receipt = None
        undo.pop_all()
        for _, layer in layers:
            ties, layer.ties = layer.ties, ()
            for tie in ties:
                shared.retie(tie)


def untie(layer: LoRALinear, name: str, undo: contextlib.ExitStack) -> None:
    """Replaces one of the layer's Parameters by a copy, until the layer is unmerged."""
    check_mergeable(layer)
    _check_parameters(layer)
    ties = layer.ties
    tie = shared.untie(layer, name)
    undo.callback(shared.put_back, tie)
    undo.callback(setattr, layer, "ties", ties)
    layer.ties = (*ties, tie)


def _check_parameters(layer: LoRALinear) -> None:
    """Raises ValueError if a tensor that the merge changes is computed (torch would recompute it without the adapter),
    TypeError if it has no memory of its own."""
    for name in parts(layer):
        parameter = param(layer, name)
        if parameter is not None and name not in layer._parameters:
            raise ValueError(f"{name}: expected a Parameter, got one that is computed (parametrize, prune, …)")
        if parameter is not None or name == "weight":
            checks.dense(name, parameter)


def _merged_bias(layer: LoRALinear, lora_bias: Tensor, scaling: float) -> BiasReceipt:
    receipt, bias = _bias_receipt(layer), layer.bias
    if bias is None:
        raise ValueError(
            "lora_bias: expected a linear with a bias to add s·b to, got one without; a merge would lose it"
        )
    return merge_bias(bias if receipt is None else receipt.before, [(lora_bias, scaling)])


def _bias_receipt(layer: LoRALinear) -> BiasReceipt | None:
    """None if no merge has changed the bias. Raises ValueError if its bits have changed since the merge."""
    if layer.bias_receipt is None:
        return None
    receipt = layer.bias_receipt.to(layer.weight.device)
    receipt.check(layer.bias)
    return receipt


def _set_bias(layer: LoRALinear, value: Tensor, undo: contextlib.ExitStack) -> None:
    assert layer.bias is not None
    bias = layer.bias.detach()
    undo.callback(write, bias, bias.clone())
    write(bias, value)


@contextlib.contextmanager
def _prefix_errors(name: str) -> Iterator[None]:
    """Prefixes errors with the name of the layer that they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not name:
            raise
        raise type(error)(f"{name}: {error}") from None


@contextlib.contextmanager
def _name_layers_in_errors(layers: Layers) -> Iterator[None]:
    """In errors that begin with "layer N: ", replaces that by the layer's name."""
    try:
        yield
    except (TypeError, ValueError) as error:
        number = re.match(r"layer (\d+): ", str(error))
        if number is None:
            raise
        name = layers[int(number[1])][0]
        raise type(error)(f"{name}: {str(error)[number.end() :]}".removeprefix(": ")) from None
