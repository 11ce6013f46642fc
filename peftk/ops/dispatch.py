"""Runs an operation with checked arguments on a backend: flatten the rows, choose the backend, call it, unflatten.

Both the eager autograd Functions and the ops registered for torch.compile come through here. weight None stands for the
identity: a series adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peftk.adapters import checks
from peftk.adapters.adapter import ALL, Adapter, AdapterGrads, Wanted
from peftk.adapters.dropout import Dropout
from peftk.adapters.table import AdapterTable
from peftk.backends import choice, determinism, gemm, registry
from peftk.backends.call import BackendError, Op, Packing, are_rows_aligned, call_of
from peftk.backends.contract import Backend, Direct, DirectMulti, require
from peftk.launch.adapter_args import contiguous
from peftk.quantized.weight import QuantizedWeight, tensors_of
from peftk.system import storage
from peftk.system.recording import is_recording


def _bias(bias: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if bias is not None and weight is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    if bias is not None:
        checks.float_dtype("bias", bias.dtype)
        if weight is not None:
            checks.mixes("bias", bias.dtype, "weight", weight.dtype)
    return contiguous(bias)


def _with_contiguous_biases(adapter: Adapter) -> Adapter:
    """The adapter with contiguous biases: the same object if they already are."""
    bias_A, bias_B = contiguous(adapter.bias_A), contiguous(adapter.bias_B)
    if bias_A is adapter.bias_A and bias_B is adapter.bias_B:
        return adapter
    return dataclasses.replace(adapter, bias_A=bias_A, bias_B=bias_B)


def direct_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    activation: str = "identity",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
) -> Tensor | None:
    """y by the shortest way to a kernel, without gradients; None if this call cannot take it.

    Takes the adapter's tensors rather than an Adapter, because making the object costs a tenth of such a call. The
    arguments are unchecked. Bad ones get None too, and the ordinary way then raises the error.
    """
    device = device_of(x)
    if not may_be_direct(device):
        return None
    adapter = (lora_A, lora_B, scaling, activation, bias_A, bias_B)
    return shortest_lora_linear(device, x, weight, bias, *adapter)


def shortest_lora_linear(
    device: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
) -> Tensor | None:
    """`direct_lora_linear` on `device_of(x)`, which `may_be_direct`."""
    limit = 0 if weight is None else choice.direct_limit(device, weight.dtype)
    adapter = (lora_A, lora_B, scaling, activation, bias_A, bias_B)
    for impl in _direct(device):
        y = impl.direct_lora_linear(x, weight, bias, *adapter, limit)
        if y is None and limit and _keeps_to_our_kernels(x, weight):
            y = impl.direct_lora_linear(x, weight, bias, *adapter, choice.NO_LIMIT)
        if y is not None:
            return y
    return None


def direct_multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: AdapterTable, ids: Tensor
) -> Tensor | None:
    """The same for a table of adapters. Raises ValueError for an id outside the table."""
    device = device_of(x)
    return shortest_multi_lora_linear(device, x, weight, bias, table, ids) if may_be_direct(device) else None


def shortest_multi_lora_linear(
    device: str, x: Tensor, weight: Tensor, bias: Tensor | None, table: AdapterTable, ids: Tensor
) -> Tensor | None:
    """`direct_multi_lora_linear` on `device_of(x)`, which `may_be_direct`."""
    if table.direct != device:
        return None
    limit = choice.direct_limit(device, weight.dtype)
    for impl in _direct_multi(device):
        y = impl.direct_multi_lora_linear(x, weight, bias, table, ids, limit)
        if y is None and limit and _keeps_to_our_kernels(x, weight):
            y = impl.direct_multi_lora_linear(x, weight, bias, table, ids, choice.NO_LIMIT)
        if y is not None:
            return y
    return None


def _keeps_to_our_kernels(x: Tensor, weight: Tensor | None) -> bool:
    """Whether a call beyond the limit of direct ones has been decided for our CPU kernels."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and storage.dense(x, weight)):
        return False
    if x.dtype != weight.dtype or x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False
    N, K = weight.shape
    M = x.numel() // max(K, 1)
    return M * K * N > choice.SMALL_CALL and choice.keeps_to_our_kernels(x.dtype, M, K, N)


def device_of(x: Tensor) -> str:
    """The type of device whose backends may take a call directly. What is no tensor is left to those of the CPU."""
    return "cuda" if isinstance(x, Tensor) and x.is_cuda else "cpu"


def may_be_direct(device: str) -> bool:
    """Whether calls may go to a backend directly: nothing records them, and no mode changes what they compute."""
    if torch.is_grad_enabled() or is_recording():
        return False  # before `_direct`: the compiler would trace into the import
    if storage.forward_ad_active() or torch.is_autocast_enabled(device):
        return False
    # the ordinary way refuses it on a GPU
    return device == "cpu" or not determinism.ever_entered or not determinism.is_batch_invariant()


@functools.cache
def _direct(device: str) -> tuple[Direct, ...]:
    """Who is asked, in order. On a GPU a decode step may go to cuda, and what it leaves to triton."""
    return tuple(found.direct for found in _present(device) if found.direct is not None)


@functools.cache
def _direct_multi(device: str) -> tuple[DirectMulti, ...]:
    return tuple(found.direct_multi for found in _present(device) if found.direct_multi is not None)


def _present(device: str) -> Iterator[Backend]:
    for name in ("cpu",) if device == "cpu" else ("cuda", "triton"):
        with contextlib.suppress(BackendError):
            yield registry.backend(name)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """x [..., K] → y [..., N], and z [M, R] if `save_z`."""
    if adapter is not None:
        checks.fits("adapter", adapter, _out_features(x, weight), x.shape[-1])
        adapter = _with_contiguous_biases(adapter)
    rows, bias = x.reshape(-1, x.shape[-1]), _bias(bias, weight)
    impl = _backend_for(rows, weight, adapter, K=x.shape[-1], dropout=dropout, backend=backend)
    y, z = require(impl.forward).lora_linear(rows, weight, bias, adapter, dropout=dropout, save_z=save_z)
    return _as_output(y, x), z


def _as_output(y: Tensor, x: Tensor) -> Tensor:
    """Reshapes y [M, N] to [..., N] for x [..., K].

    Resizes in place instead of making a view: a view returned by an autograd Function may not be changed in place. The
    caller must own y's memory.
    """
    return y if x.dim() == 2 else y.contiguous().resize_(*x.shape[:-1], y.shape[1])


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter | None,
    z: Tensor | None,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
    need_dx: bool = True,
    wanted: Wanted = ALL,
) -> tuple[Tensor | None, AdapterGrads]:
    """dy [..., N] → dx [..., K] if `need_dx`, and the adapter's gradients in `wanted`.

    x, z: may be None if no requested gradient reads them (`peftk.reference.lora_linear.lora_linear_backward`).
    """
    read = (x, *tensors_of(weight if need_dx else None), z, *(() if adapter is None else adapter.tensors()))
    backend = _backward_backend(dy, read, dropout, backend)
    rows, x_rows, K = _backward_rows(dy, x, weight)
    if adapter is not None:
        checks.fits("adapter", adapter, rows.shape[1], K)
        if z is not None and z.shape != (rows.shape[0], adapter.rank):
            raise _rank_error(z.shape[1], adapter.rank)
    impl = _backend_for(rows, weight, adapter, K=K, backward=True, dropout=dropout, backend=backend)
    dx, grads = require(impl.backward).lora_linear_backward(
        rows, x_rows, weight, adapter, z, dropout=dropout, need_dx=need_dx, wanted=wanted
    )
    return None if dx is None else dx.reshape(*dy.shape[:-1], K), grads


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """x [..., K], ids int32 [M] → y [..., N], and z [M, table.z_width] if `save_z`."""
    rows, bias = x.reshape(-1, x.shape[-1]), _bias(bias, weight)
    impl = _backend_for(rows, weight, table, K=x.shape[-1], dropout=dropout, backend=backend)
    if not impl.checks_ids and checks.ids_are_checked(x.device):
        checks.ids_in_table(ids, table)
    with choice.forcing(backend):
        y, z = require(impl.forward).multi_lora_linear(rows, weight, bias, table, ids, dropout=dropout, save_z=save_z)
    return _as_output(y, x), z


def add_adapters_(y: Tensor, x: Tensor, table: AdapterTable, ids: Tensor) -> None:
    """y [M, N] += s·(xA)B of each row's adapter, in place, where another library has computed the base layer.

    x [M, K], ids int32 [M]; y's rows are contiguous, at any distance. For inference: autograd does not see it. y is
    rounded twice, by that library and here. Raises ValueError for shapes that do not fit the table.
    """
    if x.dim() != 2 or y.shape[:-1] != x.shape[:-1] or ids.shape != x.shape[:1]:
        raise ValueError(f"y: expected [M, N] beside x [M, K] and ids [M], got {[list(t.shape) for t in (y, x, ids)]}")
    shape = y.shape[1], x.shape[1]
    if table.derived.get(add_adapters_) != shape:
        checks.bank(table.adapters, table.columns, *shape)
        table.derived[add_adapters_] = shape
    x = x if x.dtype == y.dtype else x.to(y.dtype)
    if x.numel() and y.numel():
        gemm.add_adapters_(y, x, table, ids)


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    z: Tensor | None,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
    need_dx: bool = True,
    wanted: Sequence[Wanted] | None = None,
) -> tuple[Tensor | None, list[AdapterGrads | None]]:
    """dy [..., N] → dx [..., K] if `need_dx`, and the gradients in `wanted` of every adapter of the table (None: all).

    x, z: as in `lora_linear_backward`.
    """
    backend = _backward_backend(dy, (x, *tensors_of(weight if need_dx else None), z, ids), dropout, backend)
    rows, x_rows, K = _backward_rows(dy, x, weight)
    now = table.current()
    if now is not table:
        checks.bank(now.adapters, now.columns, rows.shape[1], K)
        if z is not None and z.shape[1] != now.z_width:
            raise _rank_error(z.shape[1], now.z_width)
        table = now
    impl = _backend_for(rows, weight, table, K=K, backward=True, dropout=dropout, backend=backend)
    with choice.forcing(backend):
        dx, grads = require(impl.backward).multi_lora_linear_backward(
            rows, x_rows, weight, table, ids, z, dropout=dropout, need_dx=need_dx, wanted=wanted
        )
    return None if dx is None else dx.reshape(*dy.shape[:-1], K), grads


def _backward_rows(dy: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """dY [M, N], x [M, K] and K. Raises RuntimeError if the weight's shape has changed since the forward."""
    N, K = (dy.shape[-1], dy.shape[-1]) if weight is None else weight.shape
    if dy.shape[-1] != N or (x is not None and x.shape[-1] != K):
        raise RuntimeError(f"weight: expected the shape it had in the forward, got {[N, K]}")
    return dy.reshape(-1, N), None if x is None else x.reshape(-1, K), K


def _rank_error(before: int, now: int) -> RuntimeError:
    return RuntimeError(f"lora_A: expected {before} ranks as in the forward, got {now}")


def _backward_backend(
    dy: Tensor, saved: Sequence[Tensor | None], dropout: Dropout | None, backend: str | None
) -> str | None:
    """The forced backend of a backward: `backend`, or the reference if a tensor is not dense, as in a vmapped backward.

    Raises RuntimeError for a tensor that plain torch cannot compute with either, such as one whose memory was freed.
    """
    saved = saved if dropout is None else (*saved, dropout.seed)
    if storage.dense(dy, *saved):
        return backend
    for name, tensor in (("dy", dy), *(("a saved tensor", tensor) for tensor in saved if tensor is not None)):
        if not storage.by_torch(tensor):
            raise RuntimeError(f"backward: expected {name} to be dense, got {storage.reason(tensor)}")
    return backend or "reference"


def _backend_for(
    rows: Tensor,
    weight: Tensor | None,
    adapters: Adapter | AdapterTable | None,
    *,
    K: int,
    backward: bool = False,
    dropout: Dropout | None,
    backend: str | None,
) -> Backend:
    """The backend for a call with one adapter, a table of adapters, or none.

    rows: x [M, K], or dY [M, N] of a backward, which has x's dtype. weight None: a series adapter.
    """
    slices = 1
    if adapters is None:
        dtype, rank, count = None, 0, 0
    elif isinstance(adapters, Adapter):
        dtype, rank, count = adapters.tensors()[0].dtype, adapters.rank, 1
    else:
        dtype, rank, count, slices = adapters.dtype, adapters.max_rank, adapters.count, adapters.slices
    weight_dtype = rows.dtype if weight is None else weight.dtype
    checks.float_dtype("weight", weight_dtype)
    checks.float_dtype("lora_A", dtype or rows.dtype)
    call = call_of(
        op=Op("adapter_block" if weight is None else "lora_linear", isinstance(adapters, AdapterTable), backward),
        device=rows.device.type,
        x_dtype=rows.dtype,
        weight_dtype=weight_dtype,
        adapter_dtype=dtype,
        M=rows.shape[0],
        K=K,
        N=K if weight is None else weight.shape[0],
        rank=rank,
        adapters=count,
        dropout=dropout is not None,
        slices=slices,
        aligned=weight is None or _aligned(weight),
        packing=Packing.of(weight),
    )
    return choice.backend_for(call, backend)


def _aligned(weight: Tensor) -> bool:
    if isinstance(weight, QuantizedWeight):
        return False
    starts_on_16 = weight.data_ptr() % 16 == 0
    return are_rows_aligned(weight.stride(), weight.element_size(), starts_on_16=starts_on_16)


def _out_features(x: Tensor, weight: Tensor | None) -> int:
    """N; without a weight (the identity), N = K."""
    return x.shape[-1] if weight is None else weight.shape[0]


def bias_grad(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ dY over all rows: [N] in the bias's dtype, accumulated in fp32 (fp64 for an fp64 dY)."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=wide).to(dtype)
