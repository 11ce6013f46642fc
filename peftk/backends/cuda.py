"""The CUDA C++ kernels of `peftk._cuda`: merge, unmerge and segments. Docs: `docs/merge.md`, `docs/segments.md`.

Launches go to torch's current stream of the weight's device and return at once. Temporaries are
allocated on that stream, so the caching allocator gives their memory to nothing that could overtake the kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import peftk._cuda as _cuda
from peftk.backends.merge_args import DTYPES, OutOfPlace, rows
from peftk.backends.segments import Segments, empty
from peftk.reference import checksum
from peftk.reference.merge import Factors

if TYPE_CHECKING:
    from peftk.backends import Call

__all__ = ["cannot_serve", "checksum", "describe", "merge", "merge_", "remerge_", "segments", "unmerge", "unmerge_"]


def cannot_serve(call: Call) -> str | None:
    if call.op not in ("merge", "segments", "unmerge"):
        return f"has merge, unmerge and segments, no CUDA C++ kernel for {call.op}"
    if call.device != _cuda.device:
        return f"runs on {_cuda.device} tensors, not on {call.device}"
    if call.op == "segments":
        return None
    for name, dtype in (("weight", call.weight_dtype), ("adapter", call.adapter_dtype)):
        if dtype is not None and dtype not in DTYPES:
            return f"serves float32, bfloat16 and float16, {name} is {str(dtype).removeprefix('torch.')}"
    return None


def describe(call: Call) -> str:
    """What a call launches, for `peftk.explain`."""
    if call.op == "segments":
        one = _cuda.segments_workspace(call.M, call.adapters) == 0
        return "1 launch: segments_kernel" if one else "3 launches: sort_kernel, scan_kernel, scatter_kernel"
    return "1 launch: merge_kernel, one pass over W"


def merge(weight: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    weight = rows(weight)
    merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    code = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    _launch(_cuda.merge, weight, merged, factors, code)
    return merged, code


def unmerge(merged: Tensor, factors: Factors, code: Tensor) -> Tensor:
    merged = rows(merged)
    weight = torch.empty(merged.shape, dtype=merged.dtype, device=merged.device)
    _launch(_cuda.unmerge, merged, weight, factors, code)
    return weight


@contextlib.contextmanager
def _stream(device: torch.device) -> Iterator[int]:
    """torch's current stream of a device, which is the current device meanwhile."""
    if device.type == "cpu":  # the module that tests compile for the host
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


_in_place = OutOfPlace(merge, unmerge, checksum)
merge_, unmerge_, remerge_ = _in_place.merge_, _in_place.unmerge_, _in_place.remerge_


def _launch(kernel: Callable[..., None], weight: Tensor, out: Tensor, factors: Factors, code: Tensor) -> None:
    """Calls `_cuda.merge` or `_cuda.unmerge`: W or W' in, W' or W out. Raises RuntimeError where the launch fails."""
    A, B = factors.lora_A, factors.lora_B
    ends = torch.tensor(factors.ends, dtype=torch.int64, device=weight.device)
    scaling = torch.tensor(factors.scaling, dtype=torch.float32, device=weight.device)
    with _stream(weight.device) as stream:
        kernel(
            weight.data_ptr(),
            weight.stride(0),
            out.data_ptr(),
            out.stride(0),
            *weight.shape,
            DTYPES[weight.dtype],
            A.data_ptr(),
            B.data_ptr(),
            ends.data_ptr(),
            scaling.data_ptr(),
            len(ends),
            A.shape[0],
            DTYPES[A.dtype],
            code.data_ptr(),
            stream,
        )


def segments(ids: Tensor, adapters: int) -> Segments:
    """`peftk.reference.segments` in one launch for up to 1,024 rows, in three beyond."""
    M, device = ids.shape[0], ids.device
    found = empty(M, adapters, device)
    workspace = torch.empty(_cuda.segments_workspace(M, adapters), dtype=torch.int32, device=device)
    _cuda.segments(
        ids.data_ptr(),
        ids.stride(0),
        ids.dtype == torch.int64,
        M,
        adapters,
        *(table.data_ptr() for table in found),
        workspace.data_ptr(),
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return found
