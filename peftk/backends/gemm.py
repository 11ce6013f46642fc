"""torch's matrix product for the base layer, and our kernels for the adapters on top: C++ on a CPU, Triton on a GPU.

For processors and shapes for which torch's library multiplies faster than our kernels. `peftk tune` measures where that
is the case (`peftk.tuning`); unmeasured, it is bf16 where the processor has AMX tiles, and on a GPU what a model of its
waves says (`peftk.triton_kernels.modelled`). torch's settings hold for the product: TF32, say. The functions have the
contract's signatures.

Rounding: 16-bit results are rounded twice, once by the library and once with the adapters added, so their error bound
has an additional u·|xWᵀ + bias| (docs/numerics.md). The bits may depend on the number of threads, as the library's do.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from peftk.adapters.adapter import ALL, Adapter, AdapterGrads, Wanted
from peftk.adapters.dropout import Dropout
from peftk.adapters.table import AdapterTable
from peftk.backends import registry
from peftk.backends.call import BackendError
from peftk.backends.contract import Backend
from peftk.launch.segments import Segments
from peftk.system import autocast

if TYPE_CHECKING:
    from peftk.backends.call import Call


def backend() -> Backend:
    from peftk.backends import gemm

    return Backend(gemm, forward=gemm, backward=gemm, sort=gemm, rounds_once=False)


def cannot_run(call: Call) -> str | None:
    if call.op.kind not in ("lora_linear", "segments"):
        return f"runs lora_linear and multi_lora_linear only, got {call.op}"
    if call.op.kind == "lora_linear" and call.x_dtype != call.weight_dtype:
        return f"needs x and weight of one dtype, got {call.x_dtype} and {call.weight_dtype}"
    try:
        return registry.backend(_on_top(call.device)).about.cannot_run(call)
    except BackendError as error:
        return str(error)


def describe(call: Call) -> str:
    return f"torch's GEMM for the base layer; the adapters are added in place by the kernels of {_on_top(call.device)}"


def _on_top(device: str) -> str:
    """The backend that adds the adapters: on a CPU `cpu`, unless Triton interprets there."""
    return "cpu" if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1" else "triton"


def _kernels(x: Tensor) -> ModuleType:
    """The module of that backend, whose functions also take `base`, the result so far."""
    return importlib.import_module(f"peftk.backends.{_on_top(x.device.type)}")


def segments(ids: Tensor, adapters: int) -> Segments:
    found: Segments = _kernels(ids).segments(ids, adapters)
    return found


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
    return _kernels(x).lora_linear(x, weight, None, adapter, dropout=dropout, save_z=save_z, base=y)


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
    return _kernels(x).multi_lora_linear(x, weight, None, table, ids, dropout=dropout, save_z=save_z, base=y)


def add_adapters_(y: Tensor, x: Tensor, table: AdapterTable, ids: Tensor) -> None:
    """y [M, N] += the adapters' part, for a base layer that somebody else has computed. x has y's dtype.

    y's rows may have any stride.
    """
    kernels = _kernels(x)
    base = y if y.is_contiguous() or kernels.__name__.endswith(".cpu") else y.contiguous()
    kernels.multi_lora_linear(x, None, None, table, ids, base=base)
    if base is not y:
        y.copy_(base)


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
    return _kernels(dy).lora_linear_backward(
        dy, x, weight, adapter, z, dropout=dropout, need_dx=need_dx, wanted=wanted, base=dx
    )


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
    return _kernels(dy).multi_lora_linear_backward(
        dy, x, weight, table, ids, z, dropout=dropout, need_dx=need_dx, wanted=wanted, base=dx
    )


@autocast.without
def _base(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """xWᵀ + bias, contiguous, without autocast."""
    assert weight is not None  # `cannot_run` refuses series adapters
    if bias is not None and bias.dtype != x.dtype:
        return functional.linear(x, weight).contiguous().add_(bias)
    return functional.linear(x, weight, bias).contiguous()


@autocast.without
def _base_dx(dy: Tensor, weight: Tensor | None) -> Tensor:
    assert weight is not None
    return torch.mm(dy, weight)
