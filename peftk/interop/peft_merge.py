"""merge() and unmerge() of an accelerated PEFT layer: exact, by receipts on the layer beside its `merged_adapters`.

`merged_adapters` stays PEFT's: the names in the order of merging. Receipts say which of them, from the end, are taken
out at once and exactly; what else is at the end (a variant, or merged before the layer was accelerated) is PEFT's to
take out.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, cast

import torch
from torch import Tensor

from peftk import functional, interrupts, storage
from peftk.backends.merge_args import write
from peftk.functional import MergeReceipt
from peftk.interop import peft_reasons
from peftk.interop.peft_reasons import Base
from peftk.lasting import lasting


@dataclasses.dataclass(frozen=True)
class Merged:
    """One call of merge(): the adapters, what brings W back, and the bias before and after where adapters have one."""

    names: tuple[str, ...]
    receipt: MergeReceipt
    biases: tuple[Tensor, Tensor] | None


def reason(layer: Any, names: list[str]) -> str | None:
    """Why merging these adapters is PEFT's; None where it is ours."""
    found = peft_reasons.base(layer.base_layer)
    if isinstance(found, str):
        return found
    tensors = list(found)
    for name in names:
        adapter = peft_reasons.factors(layer, name, found[0])
        if isinstance(adapter, str):
            return adapter
        tensors += () if adapter is None else adapter.tensors()
    return next((why for t in tensors if t is not None and storage.by_torch(t) and (why := storage.reason(t))), None)


def merge(layer: Any, names: list[str]) -> None:
    """W ← W + Σ s·BA in one pass for all names that the layer has; all that can go wrong does before anything changes.

    Raises ValueError where the outcome would not be finite, RuntimeError for a bias without a place in the base layer.
    """
    weight, bias = cast(Base, peft_reasons.base(layer.base_layer))
    adapters = {name: peft_reasons.factors(layer, name, weight) for name in names}
    adapters = {name: adapter for name, adapter in adapters.items() if adapter is not None}
    if not adapters:
        return
    with lasting(), interrupts.held():  # a merged W and its receipt are not to be parted
        biases = _biases(bias, adapters)
        columns = [list(column) for column in zip(*adapters.values(), strict=True)]
        try:
            receipt = functional.merge_(weight.detach(), columns[0], columns[1], [float(s) for s in columns[3]])
        except ValueError as error:
            raise ValueError(f"{_broken(adapters)}: {error}") from error
        if bias is not None and biases is not None:
            write(bias.detach(), biases[1])
        layer.merged_adapters.extend(adapters)
        layer._peftk_merged = [*live(layer), Merged(tuple(adapters), receipt, biases)]


def _biases(bias: Tensor | None, adapters: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The base layer's bias before and after; None where no adapter has one."""
    if all(adapter.bias_B is None for adapter in adapters.values()):
        return None
    if bias is None:
        raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
    after = bias.detach().float()
    for adapter in adapters.values():
        if adapter.bias_B is not None:
            after = after + adapter.bias_B.detach().float() * adapter.scaling
    after = after.to(bias.dtype)
    if not after.isfinite().all():
        raise ValueError(f"{_broken(adapters)}: the merged bias would not be finite; nothing has changed")
    return bias.detach().clone(), after


def _broken(adapters: dict[str, Any]) -> str:
    return f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken"


def unmerge(layer: Any, peft_unmerge: Any) -> None:
    """Takes out all merged adapters, the last first. peft_unmerge: PEFT's own method, for those without receipt."""
    while layer.merged_adapters:
        receipts = live(layer)
        last = receipts[-1] if receipts else None
        if last is not None and tuple(layer.merged_adapters[-len(last.names) :]) == last.names:
            with interrupts.held():
                exactly = _exactly(layer, last)
                layer._peftk_merged = receipts[:-1]
                if exactly:
                    del layer.merged_adapters[-len(last.names) :]
                    continue
        below = layer.merged_adapters[:-1]
        del layer.merged_adapters[:-1]
        try:
            peft_unmerge()
        finally:
            layer.merged_adapters[:0] = below


def _exactly(layer: Any, merged: Merged) -> bool:
    """Brings W and the bias back, bit for bit; False where they are no longer what the merge left."""
    found = peft_reasons.base(layer.base_layer)
    try:
        if isinstance(found, str):
            raise ValueError(found)
        weight, bias = found
        if merged.biases is not None:
            before, after = (tensor.to(weight.device) for tensor in merged.biases)
            if bias is None or bias.dtype != after.dtype or not torch.equal(bias, after):
                raise ValueError("bias: expected what the merge left, got another")
        functional.unmerge_(weight.detach(), merged.receipt.to(weight.device))
    except ValueError as error:
        warnings.warn(
            f"peftk: {', '.join(merged.names)} cannot be unmerged exactly ({error}); "
            "HF PEFT's subtraction is used, which rounds",
            stacklevel=3,
        )
        return False
    if bias is not None and merged.biases is not None:
        write(bias.detach(), before)
    return True


def live(layer: Any) -> list[Merged]:
    """The receipts whose adapters are merged still."""
    kept = layer.__dict__.get("_peftk_merged", [])
    return [merged for merged in kept if set(merged.names) <= set(layer.merged_adapters)]
