"""torch's matrix product for the base layer, and the kernels of `peftk._cpu` for the adapters on top.

For processors on which torch's library multiplies faster than our kernels, for example with AMX tiles. `peftk tune`
measures where that is the case (`peftk.tuning`). The functions have the reference's signatures.

Rounding: 16-bit results are rounded twice, once by the library and once with the adapters added, so their error bound
has an additional u·|xWᵀ + bias| (docs/numerics.md). The bits may depend on the number of threads, as the library's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from peftk.adapters.adapter import ALL, Adapter, AdapterGrads, Wanted
from peftk.adapters.dropout import Dropout
from peftk.adapters.table import AdapterTable
from peftk.backends import cpu
from peftk.backends.contract import Backend

if TYPE_CHECKING:
    from peftk.backends.call import Call


def backend() -> Backend:
    from peftk.backends import gemm

    return Backend(gemm, forward=gemm, backward=gemm, rounds_once=False)


def cannot_run(call: Call) -> str | None:
    if call.op.kind != "lora_linear":
        return f"runs lora_linear and multi_lora_linear only, got {call.op}"
    if call.x_dtype != call.weight_dtype:
        return f"needs x and weight of one dtype, got {call.x_dtype} and {call.weight_dtype}"
    return cpu.cannot_run(call)


def describe(call: Call) -> str:
    return f"torch's GEMM for the base layer, then the C++ kernels' adapters, {cpu.simd_level()}"


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    y = _base(x, weight, bias)
    if adapter is None:
        return y, None
    return cpu.lora_linear(x, weight, None, adapter, dropout=dropout, save_z=save_z, base=y)


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
    y = _base(x, weight, bias)
    return cpu.multi_lora_linear(x, weight, None, table, ids, dropout=dropout, save_z=save_z, base=y)


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
    dx = _base_dx(dy, weight) if need_dx else None
    if adapter is None:
        return dx, AdapterGrads(None, None, None, None)
    return cpu.lora_linear_backward(dy, x, weight, adapter, z, dropout=dropout, need_dx=need_dx, wanted=wanted, base=dx)


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
    dx = _base_dx(dy, weight) if need_dx else None
    return cpu.multi_lora_linear_backward(
        dy, x, weight, table, ids, z, dropout=dropout, need_dx=need_dx, wanted=wanted, base=dx
    )


def _base(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """xWᵀ + bias, contiguous."""
    assert weight is not None  # `cannot_run` refuses series adapters
    if bias is not None and bias.dtype != x.dtype:
        return functional.linear(x, weight).contiguous().add_(bias)
    return functional.linear(x, weight, bias).contiguous()


def _base_dx(dy: Tensor, weight: Tensor | None) -> Tensor:
    assert weight is not None
    return torch.mm(dy, weight)
