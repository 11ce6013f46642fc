"""The adapters of LoRALinear layers into their weights and out again: all the layers of a call, or none of them.

A merged layer holds W + s·BA and bias + s·b, and what brings both back: `receipt` and `bias_receipt`.
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
from peftk.nn.parameters import own
from peftk.nn.shared import Place
from peftk.nn.watched import mergeable
from peftk.reference.receipt import BiasReceipt, merge_bias
from peftk.system import interrupts

if TYPE_CHECKING:
    from peftk.nn.lora_linear import LoRALinear

Layers = Sequence[tuple[str, "LoRALinear"]]  # by name; "" for a layer by itself


class Merge(NamedTuple):
    """What comes into a layer: s·BA and s·b."""

    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    scaling: float


def parts(layer: LoRALinear) -> tuple[str, ...]:
    """The Parameters of a layer that its merge changes."""
    return ("weight",) if layer.lora_bias is None else ("weight", "bias")


def places(layers: Layers) -> list[Place]:
    return [Place(name, layer, layer, part) for name, layer in layers for part in parts(layer)]


def merge(layers: Layers) -> None:
    """Each with its own adapter; none of them is merged."""
    switch(layers, [Merge(layer.lora_A, layer.lora_B, layer.lora_bias, layer.scaling) for _, layer in layers])


def switch(layers: Layers, merges: Sequence[Merge]) -> None:
    """From what each layer holds, merged or not, to this. The adapters' own Parameters stay as they are."""
    biases: list[BiasReceipt | None] = []
    with interrupts.deferred(), contextlib.ExitStack() as undo:  # a merged W and its receipt are not to be parted
        for (name, layer), one in zip(layers, merges, strict=True):
            with _named(name):
                mergeable(layer)
                _check(layer)
                if one.lora_bias is not None:
                    checks.dense("lora_bias", one.lora_bias)
                biases.append(None if one.lora_bias is None else _merged_bias(layer, one.lora_bias, one.scaling))
        for (_, layer), bias in zip(layers, biases, strict=True):
            if bias is not None:
                _set_bias(layer, bias.after, undo)
        with _numbered(layers):
            receipts = functional.remerge_layers_(
                [layer.matrix.detach() for _, layer in layers],
                [None if layer.receipt is None else layer.receipt.to(layer.weight.device) for _, layer in layers],
                [one.lora_A for one in merges],
                [one.lora_B for one in merges],
                [one.scaling for one in merges],
            )
        for (_, layer), receipt, bias in zip(layers, receipts, biases, strict=True):
            layer.receipt, layer.bias_receipt = receipt, bias
        undo.pop_all()


def unmerge(layers: Layers) -> None:
    """All of them are merged. What a merge has untied is shared again where it has the same bits again."""
    biases: list[BiasReceipt | None] = []
    with interrupts.deferred(), contextlib.ExitStack() as undo:
        for name, layer in layers:
            with _named(name):
                _check(layer)
                biases.append(_bias_receipt(layer))
        for (_, layer), bias in zip(layers, biases, strict=True):
            if bias is not None:
                _set_bias(layer, bias.before, undo)
        with _numbered(layers):
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
    """Gives the layer a copy of one of its Parameters, until it is unmerged."""
    mergeable(layer)
    _check(layer)
    ties = layer.ties
    tie = shared.untie(layer, name)
    undo.callback(shared.put_back, tie)
    undo.callback(setattr, layer, "ties", ties)
    layer.ties = (*ties, tie)


def _check(layer: LoRALinear) -> None:
    """Raises ValueError where what a merge changes is computed, so that torch would make it anew without the adapter;
    TypeError where it has no memory of its own."""
    for name in parts(layer):
        parameter = own(layer, name)
        if parameter is not None and name not in layer._parameters:
            raise ValueError(f"{name}: expected a Parameter, got one that is computed (parametrize, prune, …)")
        if parameter is not None or name == "weight":
            checks.dense(name, parameter)


def _merged_bias(layer: LoRALinear, lora_bias: Tensor, scaling: float) -> BiasReceipt:
    receipt, bias = _bias_receipt(layer), layer.bias
    if bias is None:
        raise ValueError(
            "lora_bias: expected a linear with a bias, which takes s·b in, got one without; a merge would lose it"
        )
    return merge_bias(bias if receipt is None else receipt.before, [(lora_bias, scaling)])


def _bias_receipt(layer: LoRALinear) -> BiasReceipt | None:
    """None where no merge has changed the bias. Raises ValueError where it is not what the merge left."""
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
def _named(name: str) -> Iterator[None]:
    """An error says which layer it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not name:
            raise
        raise type(error)(f"{name}: {error}") from None


@contextlib.contextmanager
def _numbered(layers: Layers) -> Iterator[None]:
    """An error that names layers of the list by their numbers names them by their names instead."""
    try:
        yield
    except (TypeError, ValueError) as error:
        number = re.match(r"layer (\d+): ", str(error))
        if number is None:
            raise
        name = layers[int(number[1])][0]
        raise type(error)(f"{name}: {str(error)[number.end() :]}".removeprefix(": ")) from None
