"""From an operation with checked arguments to the backend that serves it: flatten, choose, call, unflatten.

Both the eager autograd Functions and the ops registered for torch.compile come through here. weight None is the
identity, a series adapter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from peftk.adapters import checks
from peftk.adapters.adapter import ALL, Adapter, AdapterGrads, Wanted
from peftk.adapters.dropout import Dropout
from peftk.adapters.table import AdapterTable
from peftk.backends import choice, registry
from peftk.backends.call import BackendError, Op, call_of
from peftk.backends.contract import Backend, Direct, served
from peftk.launch.adapter_args import contiguous
from peftk.system import storage


def recorded() -> bool:
    """Whether somebody follows which ops run, and must see ours: torch.compile, torch.jit.trace, make_fx, a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _bias(bias: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if bias is not None and weight is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    if bias is not None:
        checks.float_dtype("bias", bias.dtype)
        if weight is not None:
            checks.mixes("bias", bias.dtype, "weight", weight.dtype)
    return contiguous(bias)


def _with_lines(adapter: Adapter) -> Adapter:
    """The adapter itself where its biases are contiguous, else one with copies."""
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
    """y of a call on a CPU, without gradients, by the shortest way to the kernel; None where there is none.

    It takes the adapter in pieces, since an object costs a tenth of such a call. Nothing has been checked: what doesn't
    fit gets None too, and its error from the other way.
    """
    server = _direct_server()
    if server is None or recorded():
        return None
    limit = 0 if weight is None else choice.direct_up_to(weight.dtype)
    return server.direct_lora_linear(x, weight, bias, lora_A, lora_B, scaling, activation, bias_A, bias_B, limit)


def direct_multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: AdapterTable, ids: Tensor
) -> Tensor | None:
    """The same for many adapters, where nothing is recorded. Raises ValueError for an id that is no adapter's."""
    server = _direct_server()
    if server is None or not table.direct:
        return None
    return server.direct_multi_lora_linear(x, weight, bias, table, ids, choice.direct_up_to(weight.dtype))


def _direct_server() -> Direct | None:
    """The cpu backend, where a call may go to it directly."""
    if torch.is_grad_enabled() or storage.tangents() or torch.is_autocast_enabled("cpu"):
        return None
    return _cpu()


@functools.cache
def _cpu() -> Direct | None:
    try:
        return registry.backend("cpu").direct
    except BackendError:
        return None


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
    """x [..., K] → y [..., N], and z [M, R] where asked."""
    if adapter is not None:
        checks.fits("adapter", adapter, _out(x, weight), x.shape[-1])
        adapter = _with_lines(adapter)
    rows, bias = x.reshape(-1, x.shape[-1]), _bias(bias, weight)
    server = _server(rows, weight, adapter, K=x.shape[-1], dropout=dropout, backend=backend)
    y, z = served(server.forward).lora_linear(rows, weight, bias, adapter, dropout=dropout, save_z=save_z)
    return _as_output(y, x), z


def _as_output(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N], which is ours alone, as [..., N] for x [..., K].

    Not as a view: one that an autograd Function returns may not be changed in place.
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
    """dy [..., N] → dx [..., K] and the adapter's gradients, as far as they are wanted.

    x, z: None where a backward reads neither (`peftk.reference.lora_linear_backward`).
    """
    read = (x, weight if need_dx else None, z, *(() if adapter is None else adapter.tensors()))
    backend = _reads_back(dy, read, dropout, backend)
    rows, x_rows, K = _backward_rows(dy, x, weight)
    if adapter is not None:
        checks.fits("adapter", adapter, rows.shape[1], K)
        if z is not None and z.shape != (rows.shape[0], adapter.rank):
            raise _other_rank(z.shape[1], adapter.rank)
    server = _server(rows, weight, adapter, K=K, backward=True, dropout=dropout, backend=backend)
    dx, grads = served(server.backward).lora_linear_backward(
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
    """x [..., K], ids int32 [M] → y [..., N], and z [M, table.z_width] where asked."""
    rows, bias = x.reshape(-1, x.shape[-1]), _bias(bias, weight)
    server = _server(rows, weight, table, K=x.shape[-1], dropout=dropout, backend=backend)
    if not server.looks_at_ids and checks.ids_are_checked(x.device):
        checks.ids_in_table(ids, table)
    with choice.forcing(backend):
        y, z = served(server.forward).multi_lora_linear(rows, weight, bias, table, ids, dropout=dropout, save_z=save_z)
    return _as_output(y, x), z


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
    """dy [..., N] → dx [..., K] and the gradients of every adapter of the table, as far as they are wanted.

    x, z: as in `lora_linear_backward`.
    """
    backend = _reads_back(dy, (x, weight if need_dx else None, z, ids), dropout, backend)
    rows, x_rows, K = _backward_rows(dy, x, weight)
    now = table.current()
    if now is not table:
        checks.bank(now.adapters, now.columns, rows.shape[1], K)
        if z is not None and z.shape[1] != now.z_width:
            raise _other_rank(z.shape[1], now.z_width)
        table = now
    server = _server(rows, weight, table, K=K, backward=True, dropout=dropout, backend=backend)
    with choice.forcing(backend):
        dx, grads = served(server.backward).multi_lora_linear_backward(
            rows, x_rows, weight, table, ids, z, dropout=dropout, need_dx=need_dx, wanted=wanted
        )
    return None if dx is None else dx.reshape(*dy.shape[:-1], K), grads


def _backward_rows(dy: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """dY [M, N], x [M, K] and K. Raises RuntimeError where the weight got another shape since the forward."""
    N, K = (dy.shape[-1], dy.shape[-1]) if weight is None else weight.shape
    if dy.shape[-1] != N or (x is not None and x.shape[-1] != K):
        raise RuntimeError(f"weight: expected the shape that it had in the forward, got {[N, K]}")
    return dy.reshape(-1, N), None if x is None else x.reshape(-1, K), K


def _other_rank(before: int, now: int) -> RuntimeError:
    return RuntimeError(f"lora_A: expected the {before} ranks of the forward, got {now}")


def _reads_back(dy: Tensor, saved: Sequence[Tensor | None], dropout: Dropout | None, backend: str | None) -> str | None:
    """The backend that a backward is to use. Plain torch for a dy that is no dense tensor, as in a vmapped backward.

    Raises RuntimeError where what the forward saved has been freed since.
    """
    saved = saved if dropout is None else (*saved, dropout.seed)
    if storage.dense(dy, *saved):
        return backend
    for name, tensor in (("dy", dy), *(("a saved tensor", tensor) for tensor in saved if tensor is not None)):
        if not storage.by_torch(tensor):
            raise RuntimeError(f"backward: expected {name} that is dense, got {storage.reason(tensor)}")
    return backend or "reference"


def _server(
    rows: Tensor,
    weight: Tensor | None,
    adapters: Adapter | AdapterTable | None,
    *,
    K: int,
    backward: bool = False,
    dropout: Dropout | None,
    backend: str | None,
) -> Backend:
    """The backend that serves one adapter, a table of them, or the base layer alone.

    rows: x, or dY of a backward, which has its dtype too. Without a weight it is a series adapter that is asked for.
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
    )
    return choice.serving(call, backend)


def _aligned(weight: Tensor) -> bool:
    across, along = weight.stride()
    return along == 1 and (weight.data_ptr() | across * weight.element_size()) % 16 == 0


def _out(x: Tensor, weight: Tensor | None) -> int:
    """N; without a weight (the identity) it is K."""
    return x.shape[-1] if weight is None else weight.shape[0]


def bias_grad(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ dY over all rows [N], accumulated in fp32 (fp64), in the bias's dtype."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=wide).to(dtype)
