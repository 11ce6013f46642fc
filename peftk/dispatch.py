"""From an operation with checked arguments to the backend that serves it: flatten, choose, call, unflatten.

Both the eager autograd Functions and the ops registered for torch.compile come through here.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from peftk import backends, checks
from peftk.reference import AdapterGrads
from peftk.table import Adapter, AdapterTable


def adapter_of(
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
    scaling: float,
    activation: str,
) -> Adapter | None:
    """The Adapter made of these tensors where they lie (strided biases are copied); None where there are none."""
    bias_A, bias_B = _line(bias_A), _line(bias_B)
    if lora_A is None or lora_B is None:
        return None if bias_B is None else Adapter((), (), scaling, activation, None, bias_B)
    return Adapter((lora_A,), (lora_B,), scaling, activation, bias_A, bias_B)


def _line(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    return _line(bias)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Adapter | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
    save_z: bool,
) -> tuple[Tensor, Tensor | None]:
    """x [..., K] → y [..., N], and z [M, R] where asked."""
    if adapter is not None:
        checks.fits("adapter", adapter, weight)
    rows, bias = x.reshape(-1, x.shape[-1]), _bias(bias, weight)
    server = _server("lora_linear", rows, weight, adapter, dropout_p, backend)
    y, z = server.lora_linear(rows, weight, bias, adapter, dropout_p=dropout_p, seed=seed, save_z=save_z)
    return y.reshape(*x.shape[:-1], weight.shape[0]), z


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    adapter: Adapter | None,
    z: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, AdapterGrads]:
    """dy [..., N] → dx [..., K] and the adapter's gradients."""
    rows = x.reshape(-1, x.shape[-1])
    server = _server("lora_linear_backward", rows, weight, adapter, dropout_p, backend)
    dx, grads = server.lora_linear_backward(
        dy.reshape(-1, dy.shape[-1]), rows, weight, adapter, z, dropout_p=dropout_p, seed=seed
    )
    return dx.reshape(x.shape), grads


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
    save_z: bool,
) -> tuple[Tensor, Tensor | None]:
    """x [..., K], ids int32 [M] → y [..., N], and z [M, table.z_width] where asked."""
    rows, bias = x.reshape(-1, x.shape[-1]), _bias(bias, weight)
    choice = backends.choose(_multi_call("multi_lora_linear", rows, weight, table, dropout_p), backend)
    # the cpu backend looks at ids itself, on its way
    if choice.backend != "cpu" and checks.look_at_ids(x.device):
        checks.ids_in_table(ids, table)
    server = backends.module(choice.backend)
    y, z = server.multi_lora_linear(rows, weight, bias, table, ids, dropout_p=dropout_p, seed=seed, save_z=save_z)
    return y.reshape(*x.shape[:-1], weight.shape[0]), z


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    table: AdapterTable,
    ids: Tensor,
    z: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, list[AdapterGrads | None]]:
    """dy [..., N] → dx [..., K] and the gradients of every adapter of the table."""
    rows = x.reshape(-1, x.shape[-1])
    choice = backends.choose(_multi_call("multi_lora_linear_backward", rows, weight, table, dropout_p), backend)
    dx, grads = backends.module(choice.backend).multi_lora_linear_backward(
        dy.reshape(-1, dy.shape[-1]), rows, weight, table, ids, z, dropout_p=dropout_p, seed=seed
    )
    return dx.reshape(x.shape), grads


def _server(
    op: str, rows: Tensor, weight: Tensor, adapter: Adapter | None, dropout_p: float, backend: str | None
) -> ModuleType:
    dtype = None
    rank = 0
    if adapter is not None:
        dtype = (adapter.pages_A[0] if adapter.pages_A else adapter.bias_B).dtype  # type: ignore[union-attr]
        rank = adapter.rank
    call = backends.Call(
        op,
        rows.device.type,
        rows.dtype,
        weight.dtype,
        dtype,
        rows.shape[0],
        rows.shape[1],
        weight.shape[0],
        rank,
        0 if adapter is None else 1,
        dropout_p > 0.0,
    )
    return backends.module(backends.choose(call, backend).backend)


def _multi_call(op: str, rows: Tensor, weight: Tensor, table: AdapterTable, dropout_p: float) -> backends.Call:
    return backends.Call(
        op,
        rows.device.type,
        rows.dtype,
        weight.dtype,
        table.dtype,
        rows.shape[0],
        rows.shape[1],
        weight.shape[0],
        table.max_rank,
        len(table.adapters),
        dropout_p > 0.0,
    )


def bias_grad(dy: Tensor, bias: Tensor) -> Tensor:
    """Σ dY over all rows [N], accumulated in fp32 (fp64), in the bias's dtype."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=wide).to(bias.dtype)
