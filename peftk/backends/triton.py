"""Triton kernels: any GPU that Triton knows, or CPU tensors where TRITON_INTERPRET=1 was set before the import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from peftk import reference
from peftk.activations import CODES
from peftk.backends.merge_args import in_rows, rows
from peftk.receipt import MergeReceipt
from peftk.reference import ALL, AdapterGrads, Wanted
from peftk.reference.merge import Factors
from peftk.table import PAGE, Adapter, AdapterTable
from peftk.triton_kernels import lora_linear as kernels
from peftk.triton_kernels import merge as merges
from peftk.triton_kernels.segments import segments

if TYPE_CHECKING:
    from peftk.backends import Call

__all__ = [
    "cannot_serve",
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
    "unmerge_",
    "unmerge_layers_",
]

_MERGES = ("merge", "unmerge")
_SERVED = ("lora_linear", "multi_lora_linear", "lora_linear_backward", "multi_lora_linear_backward", *_MERGES)
_DEVICE = "cpu" if kernels.INTERPRETED.value else "cuda"


def cannot_serve(call: Call) -> str | None:
    if call.op not in _SERVED:
        return f"no Triton kernel for {call.op}"
    if call.device != _DEVICE:
        return f"this process runs Triton on {_DEVICE} tensors (TRITON_INTERPRET=1 chooses cpu), got {call.device}"
    dtypes = {call.x_dtype, call.weight_dtype, call.adapter_dtype} - {None}
    for dtype in dtypes:
        if dtype not in kernels.DTYPES:
            return f"expected float32, bfloat16 or float16, got {dtype}"
    if call.op not in _MERGES and {torch.bfloat16, torch.float16} <= dtypes:
        return "no kernel for bfloat16 and float16 in one call: x, weight and adapters may mix float32 with one of them"
    if (
        call.op not in _MERGES
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
    """What a call launches, for `peftk.explain`."""
    if call.op == "merge":
        return "1 launch: merge_kernel, one pass over W, in place; for a list of layers the same one"
    if call.op == "unmerge":
        return (
            "2 launches, for a list of layers the same two: unmerge_kernel, restore_kernel; checksum_kernel before them"
        )
    if call.op.endswith("_backward"):
        return "torch matrix products on the device"
    if call.rank == 0:
        return "1 launch: expand_kernel"
    sort = " after one sort of the ids on the device" if call.op == "multi_lora_linear" else ""
    return f"2 launches: shrink_kernel, expand_kernel{sort}"


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
    """`peftk.reference.lora_linear` in two launches. The adapter's addresses travel as kernel arguments."""
    adapters, held = _one(adapter)
    has_z = save_z and adapters.z_width > 0
    y, z = kernels.forward(x, weight, _contiguous(bias), adapters, None, dropout_p=dropout_p, seed=seed, save_z=has_z)
    del held  # a launch in flight keeps the memory of its stream: torch's allocator reuses it in stream order
    return y, None if z is None or adapter is None else z[:, : adapter.rank]


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
    """`peftk.reference.multi_lora_linear` in two launches after one sort of the ids on the device."""
    adapters = _ADAPTERS.get(table)
    if adapters is None:
        adapters = _ADAPTERS[table] = _many(table)
    order = segments(ids, len(table.adapters))
    return kernels.forward(x, weight, _contiguous(bias), adapters, order, dropout_p=dropout_p, seed=seed, save_z=save_z)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    adapter: Adapter | None,
    z: Tensor | None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = True,
    wanted: Wanted = ALL,
) -> tuple[Tensor | None, AdapterGrads]:
    """The reference's torch products on the device, at this stage: no Triton kernel yet."""
    return reference.lora_linear_backward(
        dy, x, weight, adapter, z, dropout_p=dropout_p, seed=seed, need_dx=need_dx, wanted=wanted
    )


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    table: AdapterTable,
    ids: Tensor,
    z: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = True,
    wanted: Sequence[Wanted] | None = None,
) -> tuple[Tensor | None, list[AdapterGrads | None]]:
    """The reference's torch products on the device, at this stage: no Triton kernel yet, and it waits for the ids."""
    return reference.multi_lora_linear_backward(
        dy, x, weight, table, ids, z, dropout_p=dropout_p, seed=seed, need_dx=need_dx, wanted=wanted
    )


def merge_(weight: Tensor, factors: Factors) -> MergeReceipt:
    return merge_layers_([weight], [factors])[0]


def merge_layers_(weights: Sequence[Tensor], factors: Sequence[Factors]) -> list[MergeReceipt]:
    """One launch for all: weights of one dtype and device, adapters of one dtype. All are merged, or none."""
    with in_rows(weights) as W:
        return merges.merge_(W, factors)


def unmerge_(weight: Tensor, receipt: MergeReceipt) -> None:
    unmerge_layers_([weight], [receipt])


def unmerge_layers_(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> None:
    with in_rows(weights) as W:
        merges.unmerge_(W, receipts)


def remerge_(weight: Tensor, receipt: MergeReceipt, factors: Factors) -> MergeReceipt:
    """In a copy, which W becomes at the end: no forward in between sees the base layer."""
    W = weight.clone(memory_format=torch.contiguous_format)
    merges.unmerge_([W], [receipt])
    (new,) = merges.merge_([W], [factors])
    weight.copy_(W)
    return new


def checksum(weight: Tensor) -> int:
    return checksums([weight])[0]


def checksums(weights: Sequence[Tensor]) -> list[int]:
    return merges.checksums([rows(weight) for weight in weights])


# A table never changes, so what the launcher derives from it is derived once, and dropped with the table.
_ADAPTERS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _many(table: AdapterTable) -> kernels.Adapters:
    aligned = all(_aligned(page) for a in table.adapters if a is not None for page in a.pages_A)
    source = kernels.Many(table.pages, table.rows, table.scaling, table.biases)
    return kernels.Adapters(source, table.dtype, table.z_width, aligned)


def _one(adapter: Adapter | None) -> tuple[kernels.Adapters, tuple[Tensor, ...]]:
    """One adapter as kernel arguments, and the tensors that these point into.

    An adapter of several pages is gathered into one tensor first, on the device.
    """
    if adapter is None:
        return kernels.BASE_ONLY, ()
    A, B = adapter.lora_A, adapter.lora_B
    bias_A, bias_B = _contiguous(adapter.bias_A), _contiguous(adapter.bias_B)
    held = tuple(t for t in (A, B, bias_A, bias_B) if t is not None)
    if not held:
        return kernels.BASE_ONLY, ()
    if A is not None and A.stride(1) != 1:
        A = A.contiguous()
        held += (A,)
    source = kernels.One(
        A=0 if A is None else A.data_ptr(),
        stride_A=0 if A is None else A.stride(0),
        B=0 if B is None else B.data_ptr(),
        stride_Bn=0 if B is None else B.stride(0),
        stride_Br=0 if B is None else B.stride(1),
        bias_A=0 if bias_A is None else bias_A.data_ptr(),
        bias_B=0 if bias_B is None else bias_B.data_ptr(),
        rank=adapter.rank,
        activation=CODES[adapter.activation],
        scaling=float(adapter.scaling),
    )
    z_width = -(-adapter.rank // PAGE) * PAGE
    return kernels.Adapters(source, held[0].dtype, z_width, A is not None and _aligned(A)), held


def _aligned(A: Tensor) -> bool:
    """Whether every row of A starts on 16 bytes."""
    return A.data_ptr() % 16 == 0 and A.stride(0) * A.element_size() % 16 == 0


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
