"""The Triton kernels, for torch's "cuda" device: NVIDIA GPUs from sm_80 on, and AMD's under ROCm.

For CPU tensors instead if TRITON_INTERPRET=1 was set before import.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftk.adapters import checks, route
from peftk.adapters.activations import CODES
from peftk.adapters.adapter import ALL, PAGE, Adapter, AdapterGrads, Wanted, adapter_of, pages_of
from peftk.adapters.dropout import Dropout, flat_dropout
from peftk.adapters.table import AdapterTable
from peftk.backends import (
    choice,
    determinism,
    gemm,
    gpu_shape,
    triton_version,  # noqa: F401 - before the kernels
)
from peftk.backends import segments as sorted_rows
from peftk.backends.call import LORA_LINEAR, Call, Op, are_rows_aligned
from peftk.backends.contract import Backend
from peftk.launch.adapter_args import NO_ADAPTER, AdapterArgs, Tensors, adapter_args, contiguous
from peftk.launch.merge_layers import InPlace
from peftk.system import storage, streams
from peftk.system.lasting import keep_for_graphs, outside_pools
from peftk.triton_kernels import lora_linear as kernels
from peftk.triton_kernels import lora_wgrad as gradients
from peftk.triton_kernels import merge as merges
from peftk.triton_kernels import tuned
from peftk.triton_kernels.arithmetic import INTERPRETED as _INTERPRETED
from peftk.triton_kernels.segments import TILE, segments

__all__ = [
    "backend",
    "cannot_run",
    "checksum",
    "checksums",
    "describe",
    "direct_lora_linear",
    "direct_multi_lora_linear",
    "lora_linear",
    "lora_linear_backward",
    "merge_",
    "merge_layers_",
    "multi_lora_linear",
    "multi_lora_linear_backward",
    "remerge_",
    "segments",
    "unmerge_",
    "unmerge_layers_",
]

_MERGES = ("merge", "unmerge")
INTERPRETED = bool(_INTERPRETED.value)
_DEVICE = "cpu" if INTERPRETED else "cuda"


def backend() -> Backend:
    from peftk.backends import triton

    return Backend(
        triton,
        forward=triton,
        backward=triton,
        direct=triton,
        direct_multi=triton,
        merge=triton,
        merge_layers=triton,
        sort=triton,
    )


def cannot_run(call: Call) -> str | None:
    if call.device != _DEVICE:
        return f"runs on {_DEVICE} tensors in this process (on cpu with TRITON_INTERPRET=1), got {call.device}"
    if call.device == "cuda" and torch.version.hip and os.environ.get("PEFTK_HIP") != "1":
        return "has not run on an AMD GPU yet; PEFTK_HIP=1 lets it try"
    dtypes = {call.x_dtype, call.weight_dtype, call.adapter_dtype} - {None} if call.op.kind != "segments" else set()
    for dtype in dtypes:
        if dtype not in kernels.DTYPES:
            return f"expected float32, bfloat16 or float16, got {dtype}"
    if call.op.kind not in _MERGES and {torch.bfloat16, torch.float16} <= dtypes:
        return "no kernel for bfloat16 and float16 in one call: x, weight and adapters may mix float32 with one of them"
    if (
        call.op.kind not in _MERGES
        and torch.version.hip
        and (call.x_dtype != call.weight_dtype or not dtypes <= {call.x_dtype, torch.float32})
    ):
        return "on AMD, needs x and weight of one dtype, and adapters of that dtype or float32"
    if (
        _DEVICE == "cuda"
        and torch.version.cuda
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() < (8, 0)
    ):
        return "needs a GPU of compute capability 8.0 or later"
    return None


def describe(call: Call) -> str:
    """What a call launches, for `peftk.explain`. Assumes rows aligned to 16 bytes, and that dX is wanted."""
    if call.op.kind == "segments":
        return "1 launch: segments_kernel" if call.M <= TILE else "3 launches: sort_kernel, scan_kernel, scatter_kernel"
    if call.op.kind == "merge":
        return "1 launch: merge_kernel, one pass over W, in place; for a list of layers the same one"
    if call.op.kind == "unmerge":
        return (
            "2 launches, for a list of layers the same two: unmerge_kernel, restore_kernel; checksum_kernel before them"
        )
    if call.device != "cpu" and not torch.cuda.is_available():
        return "its plan depends on the GPU, and torch finds none here"
    device, many, backward = torch.device(call.device), call.op.many, call.op.backward
    where = tuned.target(device)
    form = gpu_shape.of(call)
    plan = tuned.lora_linear(form, device, where)
    count = (1 if plan.once or not call.rank else 2) + (1 if backward and call.rank else 0)
    words = [f"{count} launch{'es' if count > 1 else ''}{' after the sort of the ids' if many else ''}"]
    words += [f"{plan.BLOCK_M} x {plan.BLOCK_N} x {plan.BLOCK_K} tiles in {plan.num_stages} stages"]
    words += [f"W in {plan.expand_splits} splits"] if plan.expand_splits > 1 else []
    words += ["tensor descriptors"] if plan.descriptors else []
    words += ["the product begins while the shrink runs"] if plan.overlap and call.rank else []
    return f"{', '.join(words)} ({tuned.source(form, device)})"


def direct_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
    limit: int,
) -> Tensor | None:
    """y as `lora_linear` computes it, with the checks and the choice of an earlier call of the same form.

    Also for `gemm`, which adds the adapter to torch's product by these kernels. None for a form that is refused, or is
    for another backend, or whose tensors are copied first.
    """
    tensors = (x, weight, bias, lora_A, lora_B, bias_A, bias_B)
    if weight is None or not storage.dense(*tensors):
        return None
    deterministic = determinism.is_deterministic()
    forms = tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
    found = _direct_layout(forms, activation, x.device.type, os.environ.get("PEFTK_BACKEND"), deterministic)
    if found is None:
        return None
    layout, on_product = found
    if lora_A is not None and lora_B is not None:
        source = AdapterArgs(
            lora_A.data_ptr(),
            lora_A.stride(0),
            lora_B.data_ptr(),
            lora_B.stride(0),
            lora_B.stride(1),
            0 if bias_A is None else bias_A.data_ptr(),
            0 if bias_B is None else bias_B.data_ptr(),
            lora_A.shape[0],
            CODES[activation],
            float(scaling),
        )
        layout = kernels.Adapters(source, *layout[1:])
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if not on_product:
        y, _ = kernels.forward(rows, weight, bias, layout, None)
    else:
        y = gemm.product(rows, weight, bias)
        if lora_A is not None:
            kernels.forward(rows, None, None, layout, None, base=y)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def direct_multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: AdapterTable, ids: Tensor, limit: int
) -> Tensor | None:
    """The same for many adapters, with the ids of a route, or those of a user for each row."""
    if not storage.dense(x, weight, bias, ids) or table.device != x.device or checks.ids_are_checked(x.device):
        return None
    deterministic, forced = determinism.is_deterministic(), os.environ.get("PEFTK_BACKEND")
    tensors = (x, weight, bias)
    forms = tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
    on_product = _direct_multi(forms, ids.shape, ids.dtype, _about(table), x.device.type, forced, deterministic)
    if on_product is None:
        return None
    flat = route.flat(ids)
    adapters, order = _table_adapters(table), sorted_rows.of(ids.reshape(-1) if flat is None else flat, table.count)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if on_product:
        y = gemm.product(rows, weight, bias)
        kernels.forward(rows, None, None, adapters, order, base=y)
    else:
        y, _ = kernels.forward(rows, weight, bias, adapters, order)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


_TensorForm = tuple[torch.Size, tuple[int, ...], torch.dtype, bool]  # shape, strides, dtype, starts at 16 bytes
_Forms = tuple[_TensorForm | None, ...]


def _without_memory(forms: _Forms) -> list[Tensor | None]:
    return [None if form is None else torch.empty_strided(*form[:2], dtype=form[2], device="meta") for form in forms]


def _call(forms: _Forms, op: Op, device: str, **adapters: Any) -> Call:
    """forms: of x and weight, and others. adapters: the fields of Call about them."""
    x, weight = forms[:2]
    assert x is not None
    assert weight is not None
    (N, K), strides, dtype, starts_on_16 = weight
    return Call(
        op=op,
        device=device,
        x_dtype=x[2],
        weight_dtype=dtype,
        M=math.prod(x[0]) // K,
        K=K,
        N=N,
        aligned=are_rows_aligned(strides, dtype.itemsize, starts_on_16=starts_on_16),
        **adapters,
    )


_DIRECT = {"triton": False, "gemm": True}  # whose direct calls run here; and whether torch's product comes first


@choice.remembered
def _direct_layout(
    forms: _Forms, activation: str, device: str, forced: str | None, deterministic: bool
) -> tuple[kernels.Adapters, bool] | None:
    """The adapter of a direct call without its addresses, and whether it is added to torch's product.

    None if the call must go the ordinary way. forms: of x, weight, bias, lora_A, lora_B, bias_A and bias_B. The last
    two arguments are what the choice of the backend depends on besides.
    """
    x, weight, bias, A, B, a, b = _without_memory(forms)
    if x is None or weight is None:
        return None
    try:
        checks.base(weight, bias)
        checks.input(x, weight)
        checks.adapter(weight, A, B, 1.0, activation=activation, bias_A=a, bias_B=b)
    except (TypeError, ValueError):
        return None
    adapter = adapter_of(A, B, 1.0, activation=activation, bias_A=a, bias_B=b)
    if A is None and adapter is not None:
        return None  # a bias alone
    copied = (A is not None and A.stride(1) != 1) or any(t is not None and not t.is_contiguous() for t in (bias, a, b))
    call = _call(
        forms,
        LORA_LINEAR,
        device,
        adapter_dtype=None if adapter is None else adapter.tensors()[0].dtype,
        rank=0 if adapter is None else adapter.rank,
        adapters=int(adapter is not None),
    )
    chosen = choice.choose(call).backend
    if copied or chosen not in _DIRECT:
        return None
    aligned_A, aligned_B = (form is not None and form[3] for form in forms[3:5])
    return _layout(Tensors(A, B, a, b), NO_ADAPTER, aligned_A, aligned_B), _DIRECT[chosen]


_About = tuple[torch.dtype, int, int, int]  # the adapters' dtype, the largest rank, how many, slices


def _about(table: AdapterTable) -> _About:
    """What the choice depends on of a table, cached."""
    about: _About | None = table.derived.get(_about)
    if about is None:
        about = table.derived[_about] = (table.dtype, table.max_rank, table.count, table.slices)
    return about


@choice.remembered
def _direct_multi(
    forms: _Forms,
    ids_shape: torch.Size,
    ids_dtype: torch.dtype,
    about: _About,
    device: str,
    forced: str | None,
    deterministic: bool,
) -> bool | None:
    """Whether the adapters are added to torch's product; None if the call must go the ordinary way.

    forms: of x, weight and bias. The last two arguments are as in `_direct_layout`.
    """
    x, weight, bias = _without_memory(forms)
    if x is None or weight is None or ids_dtype not in (torch.int32, torch.int64) or ids_shape != x.shape[:-1]:
        return None
    try:
        checks.base(weight, bias)
        checks.input(x, weight)
    except (TypeError, ValueError):
        return None
    if bias is not None and not bias.is_contiguous():
        return None
    dtype, rank, count, slices = about
    op = LORA_LINEAR._replace(many=True)
    call = _call(forms, op, device, adapter_dtype=dtype, rank=rank, adapters=count, slices=slices)
    return _DIRECT.get(choice.choose(call).backend)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None = None,
    save_z: bool = False,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`peftk.reference.lora_linear.lora_linear` in one launch, or two where the plan says so.

    The adapter's addresses are kernel arguments.

    base: y [M, N], contiguous, if xWᵀ + bias is already computed: the adapter is added to it in place, weight is not
    read and bias is None.
    """
    adapters, tensors = _one_adapter(adapter)
    p, seed = flat_dropout(dropout)
    has_z = save_z and adapters.z_width > 0
    weight = weight if base is None else None
    y, z = kernels.forward(x, weight, contiguous(bias), adapters, None, base=base, dropout_p=p, seed=seed, save_z=has_z)
    del tensors  # safe after the launch: torch's allocator reuses memory in stream order
    return y, None if z is None or adapter is None else z[:, : adapter.rank]


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    *,
    dropout: Dropout | None = None,
    save_z: bool = False,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`peftk.reference.lora_linear.multi_lora_linear`, launched as above after one sort of the ids on the device.

    base: as in `lora_linear`.
    """
    adapters, order = _table_adapters(table), sorted_rows.of(ids, table.count)
    p, seed = flat_dropout(dropout)
    weight = weight if base is None else None
    return kernels.forward(
        x, weight, contiguous(bias), adapters, order, base=base, dropout_p=p, seed=seed, save_z=save_z
    )


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
    base: Tensor | None = None,
) -> tuple[Tensor | None, AdapterGrads]:
    """`peftk.reference.lora_linear.lora_linear_backward`: dX and u, then the adapter's gradients, a launch each.

    base: dX [M, K], contiguous, if dY W is already computed: the adapter's part is added to it in place.
    """
    adapters, tensors = _one_adapter(adapter)
    K = dy.shape[1] if weight is None else weight.shape[1]
    p, seed = flat_dropout(dropout)
    weight = weight if base is None else None
    dx, u = kernels.backward(dy, weight, K, adapters, None, z, base=base, dropout_p=p, seed=seed, need_dx=need_dx)
    if adapter is None:
        return dx, AdapterGrads(None, None, None, None)
    x, z = _fill_unread(x, z, dy, u)
    plan = gradients.plan_of_one(
        adapter.rank,
        _wanted_and_present(adapter, wanted),
        dy.shape[1],
        x.dtype,
        x.device,
        target=tuned.target(x.device),
    )
    [grads] = gradients.wgrad(dy, x, z, u, adapters, None, plan, dropout_p=p, seed=seed)
    del tensors
    return dx, grads or AdapterGrads(None, None, None, None)


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
    base: Tensor | None = None,
) -> tuple[Tensor | None, list[AdapterGrads | None]]:
    """`peftk.reference.lora_linear.multi_lora_linear_backward`: dX and u, then all adapters' gradients, a launch each.

    base: see `lora_linear_backward`.
    """
    adapters, order = _table_adapters(table), sorted_rows.of(ids, table.count)
    K = dy.shape[1] if weight is None else weight.shape[1]
    p, seed = flat_dropout(dropout)
    weight = weight if base is None else None
    dx, u = kernels.backward(dy, weight, K, adapters, order, z, base=base, dropout_p=p, seed=seed, need_dx=need_dx)
    x, z = _fill_unread(x, z, dy, u)
    plan = _plan(table, wanted, dy.shape[1], x)
    return dx, gradients.wgrad(dy, x, z, u, adapters, order, plan, dropout_p=p, seed=seed)


def _fill_unread(x: Tensor | None, z: Tensor | None, dy: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """x and z; dy or u stands in for one that no gradient reads, because the kernel needs a tensor argument."""
    return dy if x is None else x, u if z is None else z


def _plan(table: AdapterTable, wanted: Sequence[Wanted] | None, N: int, x: Tensor) -> gradients.Plan:
    """The plan for the gradients of a table's adapters. Cached by table and wanted gradients: it is on the device."""
    all_wanted = tuple(
        Wanted(False, False, False, False)
        if a is None
        else _wanted_and_present(a, ALL if wanted is None else wanted[i])
        for i, a in enumerate(table.adapters)
    )
    plans, key = table.derived, (_plan, all_wanted, N, x.dtype)
    if key not in plans:
        ranks = [None if a is None else a.rank for a in table.adapters]
        columns = table.columns or (0, N)
        plans[key] = outside_pools(x.device, lambda: gradients.plan(ranks, all_wanted, columns, x.dtype, x.device))
    plan: gradients.Plan = plans[key]
    if streams.capturing(x.device):
        keep_for_graphs(id(plan), plan)
    return plan


def _wanted_and_present(adapter: Adapter, wanted: Wanted) -> Wanted:
    """The wanted gradients, without those of tensors that the adapter does not have."""
    ranks = adapter.rank > 0
    return Wanted(
        ranks and wanted.lora_A,
        ranks and wanted.lora_B,
        wanted.bias_A and adapter.bias_A is not None,
        wanted.bias_B and adapter.bias_B is not None,
    )


_in_place = InPlace(merges.tile, merges.merge, merges.unmerge, merges.restore, merges.sum_rows)
merge_, merge_layers_ = _in_place.merge_, _in_place.merge_layers_
unmerge_, unmerge_layers_ = _in_place.unmerge_, _in_place.unmerge_layers_
remerge_, checksum, checksums = _in_place.remerge_, _in_place.checksum, _in_place.checksums


def _table_adapters(table: AdapterTable) -> kernels.Adapters:
    """The table as kernel arguments, cached."""
    adapters: kernels.Adapters | None = table.derived.get(_table_adapters)
    if adapters is None:
        adapters = table.derived[_table_adapters] = _build_table_adapters(table)
    return adapters


def _build_table_adapters(table: AdapterTable) -> kernels.Adapters:
    adapters = [a for a in table.adapters if a is not None]
    adapters += () if table.live is None else table.live.later  # a graph reads those by the same code
    layout_A = _common_layout(_layout_of(page, _starts_on_16(page)) for a in adapters for page in a.pages_A)
    layout_B = _common_layout(_layout_of(page.t(), _starts_on_16(page)) for a in adapters for page in a.pages_B)
    slices, aligned = None, 0
    if table.slices > 1:
        slices, aligned = table.ends, 1 if any(column % 16 for column in table.columns) else 16
    source = kernels.ManyAdapters(
        table.pages, table.rows, table.scaling, table.biases, slices, table.count, table.slices, aligned
    )
    return kernels.Adapters(source, table.dtype, table.z_width, layout_A, layout_B)


def _one_adapter(adapter: Adapter | None) -> tuple[kernels.Adapters, Tensors]:
    """One adapter as kernel arguments, and the tensors that these point into."""
    source, tensors = adapter_args(adapter)
    return _layout(tensors, source, _starts_on_16(tensors.A), _starts_on_16(tensors.B)), tensors


def _layout(tensors: Tensors, source: AdapterArgs, aligned_A: bool, aligned_B: bool) -> kernels.Adapters:
    """One adapter as kernel arguments, at these addresses."""
    any_tensor = tensors.any()
    if any_tensor is None:
        return kernels.BASE_ONLY
    z_width = 0 if tensors.A is None else pages_of(tensors.A.shape[0]) * PAGE
    layout_A = "k" if tensors.A is None else _layout_of(tensors.A, aligned_A)
    layout_B = "k" if tensors.B is None else _layout_of(tensors.B.t(), aligned_B)
    return kernels.Adapters(source, any_tensor.dtype, z_width, layout_A, layout_B)


def _starts_on_16(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.data_ptr() % 16 == 0


def _layout_of(pages: Tensor, aligned: bool) -> str:
    """The memory layout of A [r, K], or of Bᵀ [r, N], by the kernels' name for it. aligned: it starts at 16 bytes."""
    ranks, columns = pages.stride()
    if columns == 1 or pages.shape[1] == 1:
        return "k16" if aligned and ranks * pages.element_size() % 16 == 0 else "k"
    return "r16" if aligned and ranks == 1 and columns * pages.element_size() % 16 == 0 else "any"


def _common_layout(layouts: Iterable[str]) -> str:
    """The most specific layout that holds for all pages."""
    distinct = set(layouts)
    if len(distinct) <= 1:
        return distinct.pop() if distinct else "k"
    return "k" if distinct == {"k16", "k"} else "any"
