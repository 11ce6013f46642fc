"""Every shipped tile of `lora_wgrad`, compiled for GPUs that are not there: what ptxas and LLVM made of it."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process that does not interpret", allow_module_level=True)

from peftk.reference import Wanted
from peftk.triton_kernels import lora_wgrad as kernels
from peftk.triton_kernels.lora_linear import Adapters, Many, One
from peftk.triton_kernels.segments import Segments
from tests.test_triton_compile import F32
from tests.triton_aot import Compiled, compiling


def compile_wgrad(
    target: int | str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    rank: int,
    *,
    many: bool,
    dropout_p: float = 0.0,
    M: int = 4096,
    K: int = 4096,
    N: int = 4096,
) -> Compiled:
    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    i32, i64 = torch.int32, torch.int64
    source: One | Many = One(0, K, 0, rank, 1, 0, 0, rank, 0, 1.0)
    segments = None
    if many:
        source = Many(
            empty(64, 5, dtype=i64), empty(8, 4, dtype=i32), empty(8, dtype=F32), empty(8, 2, dtype=i64), None, 8
        )
        few = empty(10, dtype=i32)
        segments = Segments(empty(M, dtype=i64), empty(M, dtype=i32), empty(9, dtype=i32), few, few, few)
    seed = empty(1, dtype=i64) if dropout_p else None
    z = empty(M, -(-rank // 16) * 16, dtype=F32)
    dy, x = empty(M, N, dtype=dtype), empty(M, K, dtype=dtype)
    with compiling(target, kernels, ("wgrad_kernel",)) as compiled:
        adapters = Adapters(source, adapter_dtype, z.shape[1], "k16", "r16")
        count = 8 if many else 1
        plan = kernels.plan([rank] * count, [Wanted()] * count, dtype, x.device, many=many)
        kernels.wgrad(dy, x, z, z, adapters, segments, plan, dropout_p=dropout_p, seed=seed)
    assert len(compiled) == 1
    return compiled[0]
