"""From an operation with checked arguments to the backend that serves it: flatten, choose, call, unflatten.

Both the eager autograd Functions and the ops registered for torch.compile come through here. weight None is the
identity, a series adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from peftk import backends, checks, storage
from peftk.reference import AdapterGrads, Wanted
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
    checks.both_factors(lora_A, lora_B)
    bias_A, bias_B = _line(bias_A), _line(bias_B)
    if lora_A is None or lora_B is None:
        return None if bias_B is None else Adapter((), (), scaling, activation, None, bias_B)
    return Adapter((lora_A,), (lora_B,), scaling, activation, bias_A, bias_B)


def _line(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _bias(bias: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if bias is not None and weight is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    return _line(bias)


def direct_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str = "identity",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
) -> Tensor | None:
    """y of a call on a CPU, without gradients, by the shortest way to the kernel; None where there is none.

    Nothing has been checked: what doesn't fit gets None too, and its error from the other way.
    """
    server = _direct_server()
    if server is None:
        return None
    limit = 0 if weight is None else backends.direct_up_to(weight.dtype)
    return server.direct_lora_linear(x, weight, bias, lora_A, lora_B, scaling, activation, bias_A, bias_B, limit)


def direct_multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: AdapterTable, ids: Tensor
) -> Tensor | None:
    """The same for many adapters. Raises ValueError for an id that is no adapter's."""
    server = _direct_server()
    if server is None or table.slices > 1 or table.device.type != "cpu":
        return None
    return server.direct_multi_lora_linear(x, weight, bias, table, ids, backends.direct_up_to(weight.dtype))


def _direct_server() -> ModuleType | None:
    """The cpu backend, where a call may go to it directly."""
    if torch.is_grad_enabled() or storage.tangents() or torch.is_autocast_enabled("cpu"):
        return None
    return _cpu()


@functools.cache
def _cpu() -> ModuleType | None:
    try:
        return backends.module("cpu")
    except backends.BackendError:
        return None


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
    save_z: bool,
) -> tuple[Tensor, Tensor | None]:
    """x [..., K] → y [..., N], and z [M, R] where asked."""
    if adapter is not None:
        checks.fits("adapter", adapter, _out(x, weight), x.shape[-1])
    rows, bias = x.reshape(-1, x.shape[-1]), _bias(bias, weight)
    server = backends.module(_choose("lora_linear", rows, weight, adapter, dropout_p, backend))
    y, z = server.lora_linear(rows, weight, bias, adapter, dropout_p=dropout_p, seed=seed, save_z=save_z)
    return y.reshape(*x.shape[:-1], _out(x, weight)), z


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    adapter: Adapter | None,
    z: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
    need_dx: bool,
    wanted: Wanted,
) -> tuple[Tensor | None, AdapterGrads]:
    """dy [..., N] → dx [..., K] and the adapter's gradients, as far as they are wanted."""
    backend = _reads_back(dy, (x, weight, z, seed, *(() if adapter is None else adapter.tensors())), backend)
    rows = x.reshape(-1, x.shape[-1])
    server = backends.module(_choose("lora_linear_backward", rows, weight, adapter, dropout_p, backend))
    dx, grads = server.lora_linear_backward(
        dy.reshape(-1, dy.shape[-1]),
        rows,
        weight,
        adapter,
        z,
        dropout_p=dropout_p,
        seed=seed,
        need_dx=need_dx,
        wanted=wanted,
    )
    return None if dx is None else dx.reshape(x.shape), grads


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
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
    name = _choose("multi_lora_linear", rows, weight, table, dropout_p, backend)
    # the cpu backend looks at ids itself, on its way
    if name != "cpu" and checks.look_at_ids(x.device):
        checks.ids_in_table(ids, table)
    server = backends.module(name)
    with backends.forcing(backend):
        y, z = server.multi_lora_linear(rows, weight, bias, table, ids, dropout_p=dropout_p, seed=seed, save_z=save_z)
    return y.reshape(*x.shape[:-1], _out(x, weight)), z


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    z: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
    need_dx: bool,
    wanted: Sequence[Wanted],
) -> tuple[Tensor | None, list[AdapterGrads | None]]:
    """dy [..., N] → dx [..., K] and the gradients of every adapter of the table, as far as they are wanted."""
    backend = _reads_back(dy, (x, weight, z, seed, ids), backend)
    rows = x.reshape(-1, x.shape[-1])
    server = backends.module(_choose("multi_lora_linear_backward", rows, weight, table, dropout_p, backend))
    with backends.forcing(backend):
        dx, grads = server.multi_lora_linear_backward(
            dy.reshape(-1, dy.shape[-1]),
            rows,
            weight,
            table,
            ids,
            z,
            dropout_p=dropout_p,
            seed=seed,
            need_dx=need_dx,
            wanted=wanted,
        )
    return None if dx is None else dx.reshape(x.shape), grads


def _reads_back(dy: Tensor, saved: Sequence[Tensor | None], backend: str | None) -> str | None:
    """The backend that a backward is to use. Plain torch for a dy that is no dense tensor, as in a vmapped backward.

    Raises RuntimeError where what the forward saved has been freed since.
    """
    if storage.dense(dy, *saved):
        return backend
    for name, tensor in (("dy", dy), *(("a saved tensor", tensor) for tensor in saved if tensor is not None)):
        if not storage.by_torch(tensor):
            raise RuntimeError(f"backward: expected {name} that is dense, got {storage.reason(tensor)}")
    return backend or "reference"


def _choose(
    op: str,
    rows: Tensor,
    weight: Tensor | None,
    adapters: Adapter | AdapterTable | None,
    dropout_p: float,
    backend: str | None,
) -> str:
    """The name of the backend that serves one adapter, a table of them, or the base layer alone.

    Without a weight it is a series adapter that is asked for.
    """
    slices = 1
    if adapters is None:
        dtype, rank, count = None, 0, 0
    elif isinstance(adapters, Adapter):
        dtype, rank, count = adapters.tensors()[0].dtype, adapters.rank, 1
    else:
        dtype, rank, count, slices = adapters.dtype, adapters.max_rank, adapters.count, adapters.slices
    M, K = rows.shape
    kind, N = rows.device.type, _out(rows, weight)
    op = op if weight is not None else op.replace("lora_linear", "adapter_block")
    call = backends.Call(
        op,
        kind,
        rows.dtype,
        rows.dtype if weight is None else weight.dtype,
        dtype,
        M,
        K,
        N,
        rank,
        count,
        dropout_p > 0.0,
        slices,
        weight is None or _aligned(weight),
    )
    return backends.choose(call, backend).backend


def _aligned(weight: Tensor) -> bool:
    across, along = weight.stride()
    return along == 1 and (weight.data_ptr() | across * weight.element_size()) % 16 == 0


def _out(x: Tensor, weight: Tensor | None) -> int:
    """N; without a weight (the identity) it is K."""
    return x.shape[-1] if weight is None else weight.shape[0]


def bias_grad(dy: Tensor, bias: Tensor) -> Tensor:
    """Σ dY over all rows [N], accumulated in fp32 (fp64), in the bias's dtype."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=wide).to(bias.dtype)
