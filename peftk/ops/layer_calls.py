"""The operations as layers call them: weight and adapter were checked when the layer was made, so only x is looked
at."""

from __future__ import annotations

import torch
from torch import Tensor

from peftk.adapters import checks, route
from peftk.adapters.bank import AdapterBank, PackedBank
from peftk.adapters.flat import flat_tensors, pack
from peftk.adapters.table import AdapterTable
from peftk.ops import autograd, composed, custom_ops, dispatch
from peftk.system import storage


def lora_linear_unchecked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str = "identity",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`lora_linear` for layers, which checked weight and adapter when they were made: only x is looked at."""
    recorded = _recorded()
    if dropout_p == 0.0 and backend is None and not recorded and weight is not None:
        direct = dispatch.direct_lora_linear(x, weight, bias, lora_A, lora_B, scaling, activation, bias_A, bias_B)
        if direct is not None:
            return direct
    x, seed = _prepared(x, weight, dropout_p, seed)
    rest = (weight, bias, lora_A, lora_B, bias_A, bias_B, scaling, activation, dropout_p, seed, backend)
    if composed.serves(recorded, x, weight, bias, lora_A, lora_B, bias_A, bias_B, seed):
        checks.base(weight, bias)
        checks.adapter(weight, lora_A, lora_B, scaling, activation, bias_A, bias_B)
        return composed.lora_linear(x, *rest)
    return custom_ops.lora_linear(x, *rest)[0] if recorded else autograd.lora_linear(x, *rest)


def multi_lora_linear_unchecked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: AdapterBank | PackedBank | AdapterTable,
    ids: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`multi_lora_linear` for layers, which checked weight and bank when made: only x and ids, slots, are looked at."""
    recorded = _recorded()
    table = None if recorded else _table(bank)
    if table is not None and dropout_p == 0.0 and backend is None:
        direct = dispatch.direct_multi_lora_linear(x, weight, bias, table, ids)
        if direct is not None:
            return direct
    x, seed = _prepared(x, weight, dropout_p, seed)
    return _multi(x, weight, bias, bank, table, ids, dropout_p, seed, backend, recorded)


def _multi(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bank: AdapterBank | PackedBank | AdapterTable,
    table: AdapterTable | None,
    ids: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
    recorded: bool,
) -> Tensor:
    """With a weight or without one (a series adapter). table: the bank's; None where no kernel is to read it."""
    checks.ids(ids, x)
    checks.same_device("bank", bank, x.device, "x")
    tensors = flat_tensors(bank.adapters) if table is None or storage.tangents() else []
    if composed.serves(recorded, x, weight, bias, ids, seed, *tensors):
        if weight is not None:
            checks.base(weight, bias)
        adapters = bank.adapters
        for tensor in flat_tensors(adapters):
            checks.floating("adapter", tensor)
            checks.same_device("adapter", tensor, x.device, "x")
        checks.bank(adapters, bank.columns, x.shape[-1] if weight is None else weight.shape[0], x.shape[-1])
        flat = flat_ids(ids, x)
        if not recorded:
            checks.ids_in_bank(flat, adapters, max(len(bank.columns) - 1, 1))
        return composed.multi_lora_linear(x, weight, bias, adapters, bank.columns, flat, dropout_p, seed, backend)
    if table is None:
        packed = (flat_ids(ids, x), *pack(bank.adapters), bank.columns)
        return custom_ops.multi_lora_linear(x, weight, bias, *packed, dropout_p, seed, backend)[0]
    routed = route.flat(ids)
    flat = flat_ids(ids, x) if routed is None else routed
    return autograd.multi_lora_linear(x, weight, bias, table, flat, dropout_p, seed, backend)


def _table(bank: AdapterBank | PackedBank | AdapterTable) -> AdapterTable | None:
    """What the kernels read of a bank; None where they can't read a lent adapter."""
    return bank if isinstance(bank, AdapterTable) else bank.table()


def adapter_block_unchecked(
    x: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`adapter_block` for modules, which checked the adapter when they were made: only x is looked at."""
    recorded = _recorded()
    if dropout_p == 0.0 and seed is None and backend is None and not recorded:
        direct = dispatch.direct_lora_linear(x, None, None, lora_A, lora_B, scaling, activation, bias_A, bias_B)
        if direct is not None:
            return direct
    if lora_A is not None:
        checks.block_input(x, lora_A)
    x, seed = _dropping(_autocast(x), dropout_p, seed)
    rest = (None, None, lora_A, lora_B, bias_A, bias_B, scaling, activation, dropout_p, seed, backend)
    if composed.serves(recorded, x, lora_A, lora_B, bias_A, bias_B, seed):
        checks.block(x, lora_A, lora_B, scaling, activation, bias_A, bias_B)
        return composed.lora_linear(x, *rest)
    return custom_ops.lora_linear(x, *rest)[0] if recorded else autograd.lora_linear(x, *rest)


def _recorded() -> bool:
    """Whether somebody follows which ops run, and must see ours: torch.compile, torch.jit.trace, make_fx, a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def flat_ids(ids: Tensor, x: Tensor) -> Tensor:
    """int32 [M], one id a row of x flattened to [M, K]."""
    if ids.shape != x.shape[:-1]:
        ids = ids.reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
    return route.flatten(ids)


def _prepared(x: Tensor, weight: Tensor, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x checked, in autocast's dtype where that is on; and the seed that dropout needs, drawn where none was given."""
    checks.input(x, weight)
    return _dropping(_autocast(x), dropout_p, seed)


def _dropping(x: Tensor, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x, and the seed that dropout needs."""
    if dropout_p == 0.0 and seed is None:
        return x, None
    checks.dropout(dropout_p, seed, x.device)
    if dropout_p == 0.0:
        return x, None
    return x, torch.randint(0, 2**62, (1,), dtype=torch.int64, device=x.device) if seed is None else seed


def _autocast(x: Tensor) -> Tensor:
    """Under torch.autocast the output has its dtype, as with nn.Linear. W stays: kernels widen it as they read."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
