"""A row-parallel `MultiLoRALinear` whose batch has adapters with activations: xA is summed before each activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from peftk.adapters import activations, checks, route
from peftk.adapters.adapter import Adapter
from peftk.nn.multi_lora_linear import MultiLoRALinear
from peftk.reference.lora_linear import accumulate_dtype
from peftk.system import autocast

Sum = Callable[[Tensor], Tensor]  # over the ranks


def has_activation(adapter: Adapter) -> bool:
    return adapter.activation != "identity" and adapter.rank > 0


def by_number(layer: MultiLoRALinear) -> dict[int, Adapter]:
    """This rank's parts of the adapters with an activation, by their numbers."""
    bank = layer.bank
    if all(isinstance(slot, Adapter) and not has_activation(slot) for slot in bank.slots if slot is not None):
        return {}
    found = zip(bank.numbers, bank.adapters, strict=True)
    return {number: adapter for number, adapter in found if adapter is not None and has_activation(adapter)}


def without(ids: Tensor, numbers: dict[int, Adapter]) -> Tensor:
    """The ids with -1 for these adapters, whose rows the kernels then give the base layer alone."""
    return torch.where(torch.isin(ids, torch.tensor(list(numbers), dtype=ids.dtype, device=ids.device)), -1, ids)


def added(x: Tensor, ids: Tensor, adapters: dict[int, Adapter], width: int, total: Sum) -> Tensor:
    """s·act(Σ xAᵀ + a)Bᵀ + β of the rows that have these adapters, 0 for the others: [..., width], in fp32 or fp64.

    Plain torch, an adapter at a time, with one sum over the ranks for all. ids are the same on every rank.
    """
    checks.ids(ids, x)
    rows, flat = x.reshape(-1, x.shape[-1]), route.flat_ids(ids, x)
    acc = accumulate_dtype(x, *(adapter.lora_A for adapter in adapters.values()))
    with autocast.off(x.device):
        y = torch.zeros(rows.shape[0], width, dtype=acc, device=x.device)
        chosen = {number: (flat == number).nonzero().flatten() for number in adapters}
        parts = []
        for number, adapter in adapters.items():
            assert adapter.lora_A is not None
            parts.append(functional.linear(rows[chosen[number]].to(acc), adapter.lora_A.to(acc)))
        sums = total(torch.cat([part.reshape(-1) for part in parts])).split([part.numel() for part in parts])
        for (number, adapter), part, summed in zip(adapters.items(), parts, sums, strict=True):
            assert adapter.lora_B is not None
            z = summed.reshape(part.shape)
            v = activations.apply(adapter.activation, z if adapter.bias_A is None else z + adapter.bias_A)
            term = adapter.scaling * functional.linear(v, adapter.lora_B.to(acc))
            y = y.index_add(0, chosen[number], term if adapter.bias_B is None else term + adapter.bias_B)
    return y.reshape(*x.shape[:-1], width)
