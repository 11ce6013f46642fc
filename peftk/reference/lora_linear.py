"""The specification of peftk's operation in plain torch, forward and backward, one and many adapters.

    y[m] = x[m] Wᵀ + bias + s_i · act(x̃[m] A_iᵀ + a_i) B_iᵀ + β_i        i = ids[m];  ids[m] = -1 → base layer only

Shapes: x [M, K], weight W [N, K], bias [N], lora_A A [R, K], lora_B B [N, R], bias_A a [R], bias_B β [N], y [M, N].
W = None is the identity, N = K: a series adapter. x̃ is x with dropout (`peftk.reference.philox`), divided by 1 - p.
Everything is computed in `accumulate_dtype` (fp32, or fp64 when an input is fp64) and rounded once, to x's dtype.
z = x̃Aᵀ + a is what the backward needs.

These functions are checked by tests against torch.autograd; every other backend is checked against them. They favour
being readable over being fast: a Python loop over the adapters, a mask for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftk.adapters import activations
from peftk.adapters.adapter import ALL, Adapter, AdapterGrads, Wanted
from peftk.adapters.dropout import Dropout
from peftk.adapters.table import AdapterTable
from peftk.reference import philox


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any of the tensors is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One adapter for every row (None: the base layer alone). Returns y [M, N] and, if asked, z [M, R] in fp32."""
    acc = accumulate_dtype(x, weight, None if adapter is None else adapter.lora_A)
    y = base_term(x, weight, bias, acc)
    z = None
    if adapter is not None:
        delta, z = adapter_term(with_dropout(x, dropout, acc), adapter, acc)
        y = y + delta
    return y.to(x.dtype), z if save_z else None


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    *,
    dropout: Dropout | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Row m takes adapter ids[m] (int32 [M]; -1: none), of every slice of packed outputs.

    Returns y [M, N] and, if asked, z [M, table.z_width].
    """
    acc = accumulate_dtype(x, weight, *(a.lora_A for a in table.adapters if a is not None))
    y = base_term(x, weight, bias, acc)
    z = torch.zeros(x.shape[0], table.z_width, dtype=acc, device=x.device)
    dropped = with_dropout(x, dropout, acc)
    for entry, adapter in enumerate(table.adapters):
        if adapter is None:
            continue
        rows = (ids == entry % table.count).nonzero().flatten()
        delta, z_rows = adapter_term(dropped[rows], adapter, acc)
        y[rows, slice(*table.columns_of(entry, y.shape[1]))] += delta
        if z_rows is not None:
            z[rows, table.z_from(entry) : table.z_from(entry) + adapter.rank] = z_rows
    return y.to(x.dtype), z if save_z else None


def reads_z(adapter: Adapter | None, wanted: Wanted, need_dx: bool) -> bool:
    """Whether a backward reads z: dB = s·dYᵀ act(z) does, and all that has the slope act'(z) where that isn't 1."""
    if adapter is None or not adapter.pages_A:
        return False
    return wanted.lora_B or (adapter.activation != "identity" and (need_dx or wanted.lora_A or wanted.bias_A))


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter | None,
    z: Tensor | None,
    *,
    dropout: Dropout | None = None,
    need_dx: bool = True,
    wanted: Wanted = ALL,
) -> tuple[Tensor | None, AdapterGrads]:
    """Gradients for x and for the adapter; W is frozen. dy [M, N] → dx [M, K] in x's dtype, which is dy's too.

    u = (dY B) ⊙ act'(z);  dX = dY W + mask/(1-p) ⊙ (s·u A);  dA = s·uᵀ x̃;  dB = s·dYᵀ act(z);  da = s·Σu;  dβ = ΣdY

    x: None where dA isn't wanted, which alone reads it. z: None where nothing reads it (`reads_z`).
    """
    dtype = dy.dtype if x is None else x.dtype
    acc = accumulate_dtype(dy, x, weight, None if adapter is None else adapter.lora_A)
    dx = _base_dx(dy, weight, acc) if need_dx else None
    grads = AdapterGrads(None, None, None, None)
    if adapter is not None:
        factor = _dropout_factor(dy, _in(dy, weight), dropout, acc)
        dropped = None if x is None else _times(x.to(acc), factor)
        dx_adapter, grads = _adapter_backward(dy.to(acc), dropped, adapter, z, acc, need_dx, wanted)
        if dx is not None and dx_adapter is not None:
            dx = dx + _times(dx_adapter, factor)
    return None if dx is None else dx.to(dtype), grads


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    z: Tensor | None,
    *,
    dropout: Dropout | None = None,
    need_dx: bool = True,
    wanted: Sequence[Wanted] | None = None,
) -> tuple[Tensor | None, list[AdapterGrads | None]]:
    """`lora_linear_backward` per adapter over its own rows; an entry is None for an empty slot.

    wanted: by entry of table.adapters; None wants everything.
    """
    dtype = dy.dtype if x is None else x.dtype
    acc = accumulate_dtype(dy, x, weight, *(a.lora_A for a in table.adapters if a is not None))
    dx = _base_dx(dy, weight, acc) if need_dx else None
    factor = _dropout_factor(dy, _in(dy, weight), dropout, acc)
    dropped = None if x is None else _times(x.to(acc), factor)
    grads: list[AdapterGrads | None] = []
    for entry, adapter in enumerate(table.adapters):
        if adapter is None:
            grads.append(None)
            continue
        rows = (ids == entry % table.count).nonzero().flatten()
        dy_rows = dy[rows, slice(*table.columns_of(entry, dy.shape[1]))].to(acc)
        z_from, wants = table.z_from(entry), ALL if wanted is None else wanted[entry]
        z_rows = None if z is None else z[rows, z_from : z_from + adapter.rank]
        x_rows = None if dropped is None else dropped[rows]
        dx_adapter, adapter_grads = _adapter_backward(dy_rows, x_rows, adapter, z_rows, acc, need_dx, wants)
        if dx is not None and dx_adapter is not None:
            dx[rows] += dx_adapter if factor is None else dx_adapter * factor[rows]
        grads.append(adapter_grads)
    return None if dx is None else dx.to(dtype), grads


def _in(dy: Tensor, weight: Tensor | None) -> int:
    """K; without a weight (the identity) it is N."""
    return dy.shape[1] if weight is None else weight.shape[1]


def base_term(x: Tensor, weight: Tensor | None, bias: Tensor | None, acc: torch.dtype) -> Tensor:
    y = x.to(acc).clone() if weight is None else x.to(acc) @ weight.to(acc).t()
    return y if bias is None else y + bias.to(acc)


def _base_dx(dy: Tensor, weight: Tensor | None, acc: torch.dtype) -> Tensor:
    return dy.to(acc).clone() if weight is None else dy.to(acc) @ weight.to(acc)


def _dropout_factor(rows: Tensor, K: int, dropout: Dropout | None, acc: torch.dtype) -> Tensor | None:
    """mask / (1 - p) as [M, K] for so many rows, or None without dropout."""
    if dropout is None:
        return None
    return philox.keep_mask(rows.shape[0], K, dropout.p, dropout.seed).to(acc) / (1.0 - dropout.p)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def with_dropout(x: Tensor, dropout: Dropout | None, acc: torch.dtype) -> Tensor:
    return _times(x.to(acc), _dropout_factor(x, x.shape[1], dropout, acc))


def adapter_term(dropped: Tensor, adapter: Adapter, acc: torch.dtype) -> tuple[Tensor, Tensor | None]:
    delta = dropped.new_zeros(()) if adapter.bias_B is None else adapter.bias_B.to(acc)
    if adapter.lora_A is None or adapter.lora_B is None:
        return delta, None
    z = dropped @ adapter.lora_A.to(acc).t()
    if adapter.bias_A is not None:
        z = z + adapter.bias_A.to(acc)
    v = _activated(adapter.activation, z)
    return adapter.scaling * (v @ adapter.lora_B.to(acc).t()) + delta, z


def _adapter_backward(
    dy: Tensor,
    dropped: Tensor | None,
    adapter: Adapter,
    z: Tensor | None,
    acc: torch.dtype,
    need_dx: bool,
    wanted: Wanted,
) -> tuple[Tensor | None, AdapterGrads]:
    """The adapter's part of dX, if needed, and the gradients of its tensors that are wanted."""

    def grad(tensor: Tensor | None, wants: bool, compute: Callable[[], Tensor]) -> Tensor | None:
        return None if tensor is None or not wants else compute().to(tensor.dtype)

    d_bias_B = grad(adapter.bias_B, wanted.bias_B, lambda: dy.sum(0))
    if adapter.lora_A is None or adapter.lora_B is None:
        return None, AdapterGrads(None, None, None, d_bias_B)
    name, s = adapter.activation, adapter.scaling
    u = dy @ adapter.lora_B.to(acc)
    if z is not None:
        z = z.to(acc)
        u = u * activations.derivative(name, z)
    return s * (u @ adapter.lora_A.to(acc)) if need_dx else None, AdapterGrads(
        lora_A=grad(adapter.lora_A, wanted.lora_A, lambda: s * (u.t() @ dropped)),  # type: ignore[operator]
        lora_B=grad(adapter.lora_B, wanted.lora_B, lambda: s * (dy.t() @ _activated(name, z))),  # type: ignore[arg-type]
        bias_A=grad(adapter.bias_A, wanted.bias_A, lambda: s * u.sum(0)),
        bias_B=d_bias_B,
    )


def _activated(name: str, z: Tensor) -> Tensor:
    """act(z), rounded once: torch's gelu in fp32 loses relative precision below zero on some processors (1 + erf)."""
    return z if name == "identity" else activations.apply(name, z.double()).to(z.dtype)
