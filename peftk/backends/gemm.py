"""torch's own matrix product for the base layer, and the adapters on top by the kernels of `peftk._cpu`.

For processors on which a library multiplies faster than our kernels (AMX tiles, say): `peftk tune` measures where that
is so (`peftk.tuning`). The functions have the reference's signatures.

Rounding: 16-bit results are rounded twice, once by the library and once with the adapters added, so their bound has
another u·|xWᵀ + bias| (docs/numerics.md). Whether the bits depend on the number of threads is the library's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from peftk.adapters.adapter import ALL, Adapter, AdapterGrads, Wanted
from peftk.adapters.table import AdapterTable
from peftk.backends import cpu

if TYPE_CHECKING:
    from peftk.backends.call import Call


def cannot_serve(call: Call) -> str | None:
    if "lora_linear" not in call.op:
        return f"multiplies matrices, has none for {call.op}"
    if call.x_dtype != call.weight_dtype:
        return f"serves x and weight of one dtype, got {call.x_dtype} and {call.weight_dtype}"
    return cpu.cannot_serve(call)


def describe(call: Call) -> str:
    return f"torch's GEMM for the base layer, then the C++ kernels' adapters, {cpu.simd_level()}"


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    y = _base(x, weight, bias)
    if adapter is None:
        return y, None
    return cpu.lora_linear(x, weight, None, adapter, dropout_p=dropout_p, seed=seed, save_z=save_z, base=y)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    y = _base(x, weight, bias)
    return cpu.multi_lora_linear(x, weight, None, table, ids, dropout_p=dropout_p, seed=seed, save_z=save_z, base=y)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    adapter: Adapter | None,
    z: Tensor | None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = True,
    wanted: Wanted = ALL,
) -> tuple[Tensor | None, AdapterGrads]:
    dx = torch.mm(dy, weight) if need_dx else None
    if adapter is None:
        return dx, AdapterGrads(None, None, None, None)
    return cpu.lora_linear_backward(
        dy, x, weight, adapter, z, dropout_p=dropout_p, seed=seed, need_dx=need_dx, wanted=wanted, base=dx
    )


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    table: AdapterTable,
    ids: Tensor,
    z: Tensor | None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = True,
    wanted: Sequence[Wanted] | None = None,
) -> tuple[Tensor | None, list[AdapterGrads | None]]:
    dx = torch.mm(dy, weight) if need_dx else None
    return cpu.multi_lora_linear_backward(
        dy, x, weight, table, ids, z, dropout_p=dropout_p, seed=seed, need_dx=need_dx, wanted=wanted, base=dx
    )


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """xWᵀ + bias, contiguous."""
    if bias is not None and bias.dtype != x.dtype:
        return functional.linear(x, weight).contiguous().add_(bias)
    return functional.linear(x, weight, bias).contiguous()
