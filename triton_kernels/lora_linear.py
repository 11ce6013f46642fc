"""The fused forward of one linear layer with its adapters, in two launches. `docs/lora_linear.md` derives it.

    shrink   z[m] = x̃[m] A_iᵀ + a_i                                      → fp32 workspace [splits, M, z_width]
    expand   y[m] = x[m] Wᵀ + bias + s_i · act(z[m]) B_iᵀ + β_i          the base GEMM; the adapter is its epilogue

Rows are worked on in the order of their adapters (`segments`), so a block of rows meets few of them. A block goes
through its adapters one by one with dots over all its rows ("by segment"), or, where it meets so many that most of
those dots would be thrown away, gives every row its own products without dots ("by row"). Both read what an adapter
is from `peftk.table`: in device memory for many (MANY), in the kernel's arguments for one, so that a call with one
adapter copies nothing to the device. Ranks come 16 at a time, a page; no rank is a compile-time constant. Rows and
ranks are selected, never multiplied by zero: an adapter's inf stays with its own rows.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftk.reference.philox import threshold as dropout_threshold

from . import config
from .arithmetic import INTERPRETED
from .expand import expand_kernel
from .segments import PAGE, Segments
from .shrink import shrink_kernel


class One(NamedTuple):
    """One adapter, as kernel arguments. Addresses in bytes, strides in elements, 0 where there is no tensor."""

    A: int
    stride_A: int
    B: int
    stride_Bn: int
    stride_Br: int
    bias_A: int
    bias_B: int
    rank: int
    activation: int
    scaling: float


class Many(NamedTuple):
    """The tensors of a `peftk.table.AdapterTable`."""

    pages: Tensor
    rows: Tensor
    scaling: Tensor
    biases: Tensor


class Adapters(NamedTuple):
    """What the launcher needs to know about the adapters of a call."""

    source: One | Many
    dtype: torch.dtype
    z_width: int  # the largest rank in whole pages; 0: no shrink launch
    aligned: bool  # every row of every A page starts on 16 bytes


NOTHING = One(0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)
BASE_ONLY = Adapters(NOTHING, torch.float32, 0, False)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@functools.cache
def target(device: torch.device) -> int | str:
    """What `config` calls the device."""
    if INTERPRETED.value:
        return "interpreter"
    if torch.version.hip:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    segments: Segments | None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] in x's dtype and, if asked, z [M, z_width] in fp32 (zero where the row's adapter has no such rank).

    x [M, K] and weight [N, K] have any strides; bias [N] is contiguous. segments: None with one adapter. Nothing is
    copied between host and device and nothing waits, so a CUDA graph can capture the call.
    """
    M, K = x.shape
    N = weight.shape[0]
    z_width = adapters.z_width
    where = target(x.device)
    wide = K % 16 == 0 and _wide(x)
    shrink = config.shrink(M, segments is not None, wide, x.dtype, adapters.dtype, where)
    splits = config.splits(M, K, z_width, shrink) if M and z_width else 1
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    z = torch.empty(splits, M, z_width, dtype=torch.float32, device=x.device)
    if M:
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            if z_width:
                _launch_shrink(x, z, adapters, segments, dropout_p, seed, shrink, config.options(where))
            if N:
                expand = config.expand(M, segments is not None, wide and _wide(weight), x.dtype, weight.dtype, where)
                _launch_expand(x, weight, bias, y, z, adapters, segments, expand, config.options(where))
    if not save_z:
        return y, None
    return y, z[0] if splits == 1 else z.sum(0)


def _wide(t: Tensor) -> bool:
    """Whether the compiler can see that t's rows (or columns) are contiguous and start on 16 bytes."""
    along, across = sorted(t.stride())
    return along == 1 and across % 16 == 0 and t.data_ptr() % 16 == 0


def _launch_shrink(
    x: Tensor,
    z: Tensor,
    adapters: Adapters,
    segments: Segments | None,
    dropout_p: float,
    seed: Tensor | None,
    block: config.Shrink,
    options: dict[str, int | bool],
) -> None:
    splits, M, z_width = z.shape
    K = x.shape[1]
    one, many = _source(adapters)
    threshold = dropout_threshold(dropout_p)
    shrink_kernel[(triton.cdiv(M, block.BLOCK_M), z_width // PAGE.value, splits)](
        x, z, *(segments[:3] if segments else (None, None, None)), seed if dropout_p else None,
        many and many.pages, many and many.rows, many and many.biases, one.A, one.stride_A, one.bias_A, one.rank,
        M, K, x.stride(0), x.stride(1), z_width // PAGE.value, splits,
        threshold - 2**32 if threshold >= 2**31 else threshold, 1.0 / (1.0 - dropout_p),
        DTYPE=DTYPES[adapters.dtype], MANY=many is not None, ALIGNED=adapters.aligned, DROPOUT=dropout_p > 0.0,
        QUADS=K % 4 == 0, **block._asdict(), **options,
    )  # fmt: skip


def _launch_expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor,
    adapters: Adapters,
    segments: Segments | None,
    block: config.Expand,
    options: dict[str, int | bool],
) -> None:
    splits, M, z_width = z.shape
    N, K = weight.shape
    one, many = _source(adapters)
    expand_kernel[(triton.cdiv(M, block.BLOCK_M) * triton.cdiv(N, block.BLOCK_N),)](
        x, weight, bias, y, z, *(segments[:3] if segments else (None, None, None)),
        many and many.pages, many and many.rows, many and many.scaling, many and many.biases,
        one.B, one.stride_Bn, one.stride_Br, one.bias_B, one.rank, one.activation, one.scaling,
        M, N, K, x.stride(0), x.stride(1), weight.stride(0), weight.stride(1), z_width // PAGE.value, splits,
        DTYPE=DTYPES[adapters.dtype], MANY=many is not None, **block._asdict(), **options,
    )  # fmt: skip


def _source(adapters: Adapters) -> tuple[One, Many | None]:
    source = adapters.source
    return (NOTHING, source) if isinstance(source, Many) else (source, None)
