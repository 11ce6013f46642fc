"""The operations as layers call them: weight and adapter were checked when the layer was made, so only x is looked at.

With one adapter, whoever has its tensors tries `peftk.ops.dispatch.direct_lora_linear` first, and makes an Adapter only
where that gives None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftk.adapters import checks, route
from peftk.adapters.adapter import Adapter, flat_adapter
from peftk.adapters.bank import AdapterBank, PackedBank
from peftk.adapters.dropout import Dropout, flat_dropout
from peftk.adapters.flat import flat_tensors, pack
from peftk.adapters.table import AdapterTable
from peftk.ops import autograd, composed, custom_ops, dispatch
from peftk.ops.dispatch import recorded
from peftk.system import storage


def base_linear_unchecked(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`lora_linear` without an adapter: y = xWᵀ + bias."""
    y = dispatch.direct_lora_linear(x, weight, bias, None, None, 1.0)
    return lora_linear_unchecked(x, weight, bias, None) if y is None else y


def lora_linear_unchecked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> Tensor:
    """`peftk.functional.lora_linear` for layers."""
    checks.input(x, weight)
    return _one(_autocast(x), weight, bias, adapter, dropout=dropout, backend=backend)


def adapter_block_unchecked(
    x: Tensor, adapter: Adapter | None, *, dropout: Dropout | None = None, backend: str | None = None
) -> Tensor:
    """`peftk.functional.adapter_block` for modules."""
    if adapter is not None and adapter.lora_A is not None:
        checks.block_input(x, adapter.lora_A)
    return _one(_autocast(x), None, None, adapter, dropout=dropout, backend=backend)


def _one(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None,
    backend: str | None,
) -> Tensor:
    """With a weight or without one (a series adapter)."""
    follows, p_and_seed = recorded(), flat_dropout(dropout)
    tensors = () if adapter is None else adapter.tensors()
    if composed.serves(follows, x, weight, bias, p_and_seed[1], *tensors):
        if weight is None:
            checks.block(x, *flat_adapter(adapter))
        else:
            checks.base(weight, bias)
            checks.adapter(weight, *flat_adapter(adapter))
        return composed.lora_linear(x, weight, bias, adapter, dropout=dropout, backend=backend)
    if follows:
        return custom_ops.lora_linear(x, weight, bias, *flat_adapter(adapter), *p_and_seed, backend)[0]
    return autograd.lora_linear(x, weight, bias, adapter, dropout=dropout, backend=backend)


def multi_lora_linear_unchecked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: AdapterBank | PackedBank | AdapterTable,
    ids: Tensor,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> Tensor:
    """`peftk.functional.multi_lora_linear` for layers: only x and ids, slots, are looked at."""
    table = None if recorded() else _table(bank)
    if table is not None and dropout is None and backend is None:
        direct = dispatch.direct_multi_lora_linear(x, weight, bias, table, ids)
        if direct is not None:
            return direct
    checks.input(x, weight)
    return _many(_autocast(x), weight, bias, bank, ids, table=table, dropout=dropout, backend=backend)


def multi_adapter_block_unchecked(
    x: Tensor,
    bank: AdapterBank | AdapterTable,
    ids: Tensor,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> Tensor:
    """`peftk.functional.multi_adapter_block` with x and a bank that fit, and ids, slots."""
    table = None if recorded() else _table(bank)
    return _many(_autocast(x), None, None, bank, ids, table=table, dropout=dropout, backend=backend)


def _many(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bank: AdapterBank | PackedBank | AdapterTable,
    ids: Tensor,
    *,
    table: AdapterTable | None,
    dropout: Dropout | None,
    backend: str | None,
) -> Tensor:
    """With a weight or without one (a series adapter). table: the bank's; None where no kernel is to read it."""
    checks.ids(ids, x)
    checks.same_device("bank", bank, x.device, "x")
    follows, p_and_seed = recorded(), flat_dropout(dropout)
    tensors = flat_tensors(bank.adapters) if table is None or storage.tangents() else []
    if composed.serves(follows, x, weight, bias, ids, p_and_seed[1], *tensors):
        if weight is not None:
            checks.base(weight, bias)
        adapters = bank.adapters
        for tensor in flat_tensors(adapters):
            checks.floating("adapter", tensor)
            checks.same_device("adapter", tensor, x.device, "x")
        checks.bank(adapters, bank.columns, x.shape[-1] if weight is None else weight.shape[0], x.shape[-1])
        flat = flat_ids(ids, x)
        if not follows:
            checks.ids_in_bank(flat, adapters, max(len(bank.columns) - 1, 1))
        return composed.multi_lora_linear(x, weight, bias, bank, flat, dropout=dropout, backend=backend)
    if table is None:
        packed = (*pack(bank.adapters), bank.columns, flat_ids(ids, x))
        return custom_ops.multi_lora_linear(x, weight, bias, *packed, *p_and_seed, backend)[0]
    routed = route.flat(ids)
    flat = flat_ids(ids, x) if routed is None else routed
    return autograd.multi_lora_linear(x, weight, bias, table, flat, dropout=dropout, backend=backend)


def _table(bank: AdapterBank | PackedBank | AdapterTable) -> AdapterTable | None:
    """What the kernels read of a bank; None where they can't read a lent adapter."""
    return bank if isinstance(bank, AdapterTable) else bank.table()


def flat_ids(ids: Tensor, x: Tensor) -> Tensor:
    """int32 [M], one id per row of x flattened to [M, K]."""
    if ids.shape != x.shape[:-1]:
        ids = ids.reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
    return route.flatten(ids)


def _autocast(x: Tensor) -> Tensor:
    """Under torch.autocast the output has its dtype, as with nn.Linear. W stays: kernels widen it as they read."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
