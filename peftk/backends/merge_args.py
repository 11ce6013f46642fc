"""What `_cpu.merge` and `_cuda.merge` take alike, as in csrc/bindings/merge_args.h."""

from __future__ import annotations

import torch
from torch import Tensor

# as in csrc/common/dtype.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def rows(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, else a copy."""
    return x if x.stride()[1] == 1 else x.contiguous()


def factors(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B contiguous and of one dtype, as the kernels take them; widening is exact."""
    if lora_A.dtype != lora_B.dtype:
        lora_A, lora_B = lora_A.float(), lora_B.float()
    return lora_A.contiguous(), lora_B.contiguous()


def merge_args(
    weight: Tensor, out: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, code: Tensor
) -> tuple[int | float, ...]:
    """All arguments but the last one (threads or stream). They are addresses: the caller keeps the tensors alive."""
    N, K = weight.shape
    return (
        weight.data_ptr(),
        weight.stride(0),
        out.data_ptr(),
        out.stride(0),
        lora_A.data_ptr(),
        lora_B.data_ptr(),
        code.data_ptr(),
        N,
        K,
        lora_A.shape[0],
        scaling,
        DTYPES[weight.dtype],
        DTYPES[lora_A.dtype],
    )
