"""The operations as layers call them. Layers checked weight and adapter when they were made, so only x is checked here.

A layer with one adapter tries `peftk.ops.dispatch.direct_lora_linear` itself, and builds an Adapter and comes here only
if that returns None. The base layer alone and many adapters try their direct call here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftk.adapters import carry, checks, route
from peftk.adapters.adapter import Adapter, flat_adapter
from peftk.adapters.bank import AdapterBank, AnyBank, PackedBank
from peftk.adapters.dropout import Dropout, flat_dropout
from peftk.adapters.flat import flat_tensors, pack
from peftk.adapters.route import RoutedLayer
from peftk.adapters.table import AdapterTable
from peftk.ops import autograd, composed, custom_ops, dispatch
from peftk.system import autocast, storage
from peftk.system.recording import is_recording


def base_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The base layer alone: y = xWᵀ + bias."""
    y = dispatch.direct_lora_linear(x, weight, bias, None, None, 1.0)
    return lora_linear(x, weight, bias, None) if y is None else y


def routed_linear(
    layer: RoutedLayer, server_key: route.ServerKey, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """A layer that gets its ids from the enclosing route, by the shortest way to a kernel; outside of a route the base
    layer alone. None if this call cannot take it.

    A decode step spends its time here, once per linear. So everything is asked once, and what does not depend on the
    layer was found by the first one of the step: the rows' slots by the shape of x (`RoutedForward.rows`).
    """
    device = dispatch.device_of(x)
    if not dispatch.may_be_direct(device) or carry.may_be_checkpointed(trains=layer.training):
        return None
    forward, order = route.current_forward(server_key)
    if forward is None:
        return dispatch.shortest_lora_linear(device, x, weight, bias, None, None, 1.0, "identity", None, None)
    bank = layer.bank
    if order is not None or weight.shape != bank.shape or not (layer.row_order_checked or forward.route.order_is_known):
        return None
    table = bank.table()
    if table is None or type(x) is not Tensor or x.is_nested:  # the ordinary way says what x is
        return None
    return dispatch.shortest_multi_lora_linear(device, x, weight, bias, table, forward.rows(x, layer.batch_dim))


def lora_linear(
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
    return _single_adapter(x, weight, bias, adapter, dropout=dropout, backend=backend)


def adapter_block(
    x: Tensor, adapter: Adapter | None, *, dropout: Dropout | None = None, backend: str | None = None
) -> Tensor:
    """`peftk.functional.adapter_block` for modules."""
    if adapter is not None and adapter.lora_A is not None:
        checks.block_input(x, adapter.lora_A)
    return _single_adapter(x, None, None, adapter, dropout=dropout, backend=backend)


def _single_adapter(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None,
    backend: str | None,
) -> Tensor:
    """One adapter or none. weight None: a series adapter."""
    recording, p_and_seed = is_recording(), flat_dropout(dropout)
    x, weight = autocast.cast(x, weight, recording=recording)
    tensors = () if adapter is None else adapter.tensors()
    if composed.should_run(recording, x, weight, bias, p_and_seed[1], *tensors):
        if weight is None:
            checks.block(x, *flat_adapter(adapter))
        else:
            checks.base(weight, bias)
            lora_A, lora_B, scaling, activation, bias_A, bias_B = flat_adapter(adapter)
            checks.adapter(weight, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)
        return composed.lora_linear(x, weight, bias, adapter, dropout=dropout, backend=backend)
    if recording:
        arguments = (x, weight, bias, *flat_adapter(adapter), *p_and_seed, backend)
        if _is_inference(x, bias, *tensors):
            return custom_ops.lora_linear_forward(*arguments)
        return custom_ops.lora_linear(*arguments)[0]
    return autograd.lora_linear(x, weight, bias, adapter, dropout=dropout, backend=backend)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: AnyBank,
    ids: Tensor,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> Tensor:
    """`peftk.functional.multi_lora_linear` for layers: checks only x and ids (slots of the bank)."""
    device = dispatch.device_of(x)
    is_direct = dropout is None and backend is None and dispatch.may_be_direct(device)
    table = _table(bank) if is_direct or not is_recording() else None
    if is_direct and table is not None:
        direct = dispatch.shortest_multi_lora_linear(device, x, weight, bias, table, ids)
        if direct is not None:
            return direct
    checks.input(x, weight)
    return _multi_adapter(x, weight, bias, bank, ids, table=table, dropout=dropout, backend=backend)


def slots_of(bank: AdapterBank | PackedBank | AdapterTable, ids: Tensor) -> Tensor:
    """The slots of the numbers in `ids`, as `AdapterBank.slots_of`. In an AdapterTable they are the same."""
    if isinstance(bank, AdapterTable):
        return ids
    if _is_compiled_here() and isinstance(ids, Tensor):
        return custom_ops.slots_of(ids, bank.handle)
    return bank.slots_of(ids)


def _is_compiled_here() -> bool:
    """Whether a graph is compiled for this process: its ops may find a bank by its number, and it does not outlive what
    it was compiled for, as whether gradients are needed."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def _is_inference(*tensors: Tensor | None) -> bool:
    """Whether a compiled call with these tensors needs no gradients."""
    return _is_compiled_here() and not (torch.is_grad_enabled() and autograd.wants_grad(*tensors))


def _serves(bank: AnyBank, x: Tensor, bias: Tensor | None) -> bool:
    """Whether a compiled call reads the bank's own adapters only, and needs no gradients."""
    return isinstance(bank, AdapterBank | PackedBank) and not bank.lent and _is_inference(x, bias)


def multi_adapter_block(
    x: Tensor,
    bank: AdapterBank | AdapterTable,
    ids: Tensor,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> Tensor:
    """`peftk.functional.multi_adapter_block`: x and bank must fit; checks only ids (slots of the bank)."""
    table = None if is_recording() else _table(bank)
    return _multi_adapter(x, None, None, bank, ids, table=table, dropout=dropout, backend=backend)


def _multi_adapter(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bank: AnyBank,
    ids: Tensor,
    *,
    table: AdapterTable | None,
    dropout: Dropout | None,
    backend: str | None,
) -> Tensor:
    """Many adapters. weight None: series adapters. table: the bank's table; None if no kernel may read it."""
    checks.ids(ids, x)
    checks.same_device("bank", bank, x.device, "x")
    recording, p_and_seed = is_recording(), flat_dropout(dropout)
    x, weight = autocast.cast(x, weight, recording=recording)
    serves = table is None and _serves(bank, x, bias)
    tensors = flat_tensors(bank.adapters) if (table is None and not serves) or storage.forward_ad_active() else []
    if composed.should_run(recording, x, weight, bias, ids, p_and_seed[1], *tensors):
        if weight is not None:
            checks.base(weight, bias)
        adapters = bank.adapters
        for tensor in flat_tensors(adapters):
            checks.floating("adapter", tensor)
            checks.same_device("adapter", tensor, x.device, "x")
        checks.bank(adapters, bank.columns, x.shape[-1] if weight is None else weight.shape[0], x.shape[-1])
        flat = route.flat_ids(ids, x)
        if not recording:
            checks.ids_in_bank(flat, adapters, max(len(bank.columns) - 1, 1))
        return composed.multi_lora_linear(x, weight, bias, bank, flat, dropout=dropout, backend=backend)
    if serves and isinstance(bank, AdapterBank | PackedBank):
        return custom_ops.bank_lora_linear(x, weight, bias, bank.handle, ids, *p_and_seed, backend)
    if table is None:
        packed = (*pack(bank.adapters), bank.columns, route.flat_ids(ids, x))
        return custom_ops.multi_lora_linear(x, weight, bias, *packed, *p_and_seed, backend)[0]
    routed = route.flat(ids)
    flat = route.flat_ids(ids, x) if routed is None else routed
    return autograd.multi_lora_linear(x, weight, bias, table, flat, dropout=dropout, backend=backend)


def _table(bank: AnyBank) -> AdapterTable | None:
    """The table that kernels read; None if the bank has a lent adapter that they cannot read."""
    if isinstance(bank, AdapterTable):
        return bank if bank.live is None else bank.current()
    return bank.table()
