"""The CUDA C++ kernels of `peftk._cuda`: merge and unmerge. Docs: `docs/merge.md`.

Launches go to torch's current stream of the weight's device and return at once. Temporaries are
allocated on that stream, so the caching allocator gives their memory to nothing that could overtake the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import peftk._cuda as _cuda
from peftk.backends.merge_args import DTYPES, factors, merge_args, rows
from peftk.reference import inspect

if TYPE_CHECKING:
    from peftk.backends import Call

__all__ = ["cannot_serve", "describe", "inspect", "merge", "unmerge"]


def cannot_serve(call: Call) -> str | None:
    if call.op not in ("merge", "unmerge"):
        return f"has merge and unmerge, no CUDA C++ kernel for {call.op}"
    if call.device != "cuda":
        return f"runs on cuda tensors, not on {call.device}"
    for name, dtype in (("weight", call.weight_dtype), ("adapter", call.adapter_dtype)):
        if dtype is not None and dtype not in DTYPES:
            return f"serves float32, bfloat16 and float16, {name} is {str(dtype).removeprefix('torch.')}"
    return None


def describe(call: Call) -> str:
    """What a call launches, for `peftk.explain`."""
    return "1 launch: merge_kernel, one pass over W"


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    weight = rows(weight)
    merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    code = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    _launch(_cuda.merge, weight, merged, lora_A, lora_B, scaling, code)
    return merged, code


def unmerge(merged: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, code: Tensor) -> Tensor:
    merged = rows(merged)
    weight = torch.empty(merged.shape, dtype=merged.dtype, device=merged.device)
    _launch(_cuda.unmerge, merged, weight, lora_A, lora_B, scaling, code.contiguous())
    return weight


def _launch(
    kernel: Callable[..., None],
    weight: Tensor,
    out: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    code: Tensor,
) -> None:
    """Calls `_cuda.merge` or `_cuda.unmerge`: W or W' in, W' or W out. Raises RuntimeError where the launch fails."""
    lora_A, lora_B = factors(lora_A, lora_B)
    stream = torch.cuda.current_stream(weight.device).cuda_stream
    with torch.cuda.device(weight.device):
        kernel(*merge_args(weight, out, lora_A, lora_B, scaling, code), stream)
