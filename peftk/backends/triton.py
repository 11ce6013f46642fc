"""The Triton kernels, for torch's "cuda" device: NVIDIA GPUs from sm_80 on, and AMD's under ROCm.

For CPU tensors instead if TRITON_INTERPRET=1 was set before import.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from peftk.adapters.adapter import ALL, PAGE, Adapter, AdapterGrads, Wanted, pages_of
from peftk.adapters.dropout import Dropout, flat_dropout
from peftk.adapters.table import AdapterTable
from peftk.backends import (
    gpu_shape,
    triton_version,  # noqa: F401 - before the kernels
)
from peftk.backends import segments as sorted_rows
from peftk.backends.contract import Backend
from peftk.launch.adapter_args import Tensors, adapter_args, contiguous
from peftk.launch.merge_layers import InPlace
from peftk.triton_kernels import lora_linear as kernels
from peftk.triton_kernels import lora_wgrad as gradients
from peftk.triton_kernels import merge as merges
from peftk.triton_kernels import tuned
from peftk.triton_kernels.arithmetic import INTERPRETED as _INTERPRETED
from peftk.triton_kernels.segments import TILE, segments

if TYPE_CHECKING:
    from peftk.backends.call import Call

__all__ = [
    "backend",
    "cannot_run",
    "checksum",
    "checksums",
    "describe",
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

    return Backend(triton, forward=triton, backward=triton, merge=triton, merge_layers=triton, sort=triton)


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
    """`peftk.reference.lora_linear.lora_linear` in one launch, or two where a tuned plan says so.

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
    """`peftk.reference.lora_linear.lora_linear_backward` in two launches: dX and u, then the adapter's gradients.

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
    plan = gradients.plan(
        [adapter.rank], [_wanted_and_present(adapter, wanted)], (0, dy.shape[1]), x.dtype, x.device, many=False
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
    """`peftk.reference.lora_linear.multi_lora_linear_backward` in two launches: dX and u, then all adapters' gradients.

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
    plans = _PLANS.setdefault(table, {})
    key = (all_wanted, N, x.dtype)
    if key not in plans:
        ranks = [None if a is None else a.rank for a in table.adapters]
        plans[key] = gradients.plan(ranks, all_wanted, table.columns or (0, N), x.dtype, x.device)
    return plans[key]


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


# A table does not change, so the arguments made from it are cached, and dropped with the table.
_ADAPTERS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _table_adapters(table: AdapterTable) -> kernels.Adapters:
    adapters = _ADAPTERS.get(table)
    if adapters is None:
        adapters = _ADAPTERS[table] = _build_table_adapters(table)
    return adapters


def _build_table_adapters(table: AdapterTable) -> kernels.Adapters:
    adapters = [a for a in table.adapters if a is not None]
    adapters += () if table.live is None else table.live.later  # a graph reads those by the same code
    layout_A = _common_layout(_layout_of(page) for a in adapters for page in a.pages_A)
    layout_B = _common_layout(_layout_of(page.t()) for a in adapters for page in a.pages_B)
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
    any_tensor = tensors.any()
    if adapter is None or any_tensor is None:
        return kernels.BASE_ONLY, tensors
    z_width = pages_of(adapter.rank) * PAGE
    layout_A = "k" if tensors.A is None else _layout_of(tensors.A)
    layout_B = "k" if tensors.B is None else _layout_of(tensors.B.t())
    return kernels.Adapters(source, any_tensor.dtype, z_width, layout_A, layout_B), tensors


def _layout_of(pages: Tensor) -> str:
    """The memory layout of A [r, K], or of Bᵀ [r, N], by the kernels' name for it."""
    ranks, columns = pages.stride()
    aligned = pages.data_ptr() % 16 == 0
    if columns == 1 or pages.shape[1] == 1:
        return "k16" if aligned and ranks * pages.element_size() % 16 == 0 else "k"
    return "r16" if aligned and ranks == 1 and columns * pages.element_size() % 16 == 0 else "any"


def _common_layout(layouts: Iterable[str]) -> str:
    """The most specific layout that holds for all pages."""
    distinct = set(layouts)
    if len(distinct) <= 1:
        return distinct.pop() if distinct else "k"
    return "k" if distinct == {"k16", "k"} else "any"
