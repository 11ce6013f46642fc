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
from .arithmetic import INTERPRETED, activate, dot, round_to
from .philox import keep
from .segments import Segments

PAGE = tl.constexpr(16)
_NO_ID = tl.constexpr(2**31 - 1)  # above every adapter id


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


# Arguments that change between calls and would otherwise each compile again for 1, or for a multiple of 16.
_VARYING = ["M", "z_width", "splits", "one_A", "one_stride_A", "one_B", "one_stride_Bn", "one_stride_Br", "one_bias_A"]
_VARYING += ["one_bias_B", "one_rank", "one_activation", "one_scaling", "threshold", "keep_scale"]


@triton.jit
def _locate(position, inside, order, ids, M, MANY: tl.constexpr):
    """The original row (int64) and the adapter (-1: none, or outside) at sorted positions. Every row is readable."""
    if MANY:
        row = tl.load(order + position, mask=inside, other=0).to(tl.int64)
        id = tl.load(ids + position, mask=inside, other=-1)
    else:
        row = tl.minimum(position, M - 1).to(tl.int64)
        id = tl.where(inside, 0, -1)
    return row, id


@triton.jit
def _is_head(position, id, ids, BLOCK_M: tl.constexpr):
    """True at the first row of each segment of a block. Only with MANY."""
    lane = tl.arange(0, BLOCK_M)
    before = tl.load(ids + position - 1, mask=(lane > 0) & (id >= 0), other=-1)
    return (id >= 0) & (id != before)


@triton.jit
def _next_id(id, after):
    """The smallest adapter of the block that is above `after`, or _NO_ID."""
    return tl.min(tl.where((id >= 0) & (id > after), id, _NO_ID))


@triton.jit(do_not_specialize=_VARYING)
def shrink_kernel(
    x,
    z,
    order,
    ids,
    seed,
    pages,
    rows,
    biases,
    one_A: tl.int64,
    one_stride_A: tl.int64,
    one_bias_A: tl.int64,
    one_rank: tl.int32,
    M: tl.int32,
    K,
    stride_xm,
    stride_xk,
    z_width: tl.int32,
    splits: tl.int32,
    threshold: tl.int32,
    keep_scale: tl.float32,
    DTYPE: tl.constexpr,
    MANY: tl.constexpr,
    ALIGNED: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One page of z for one block of rows over one range of K: partial sums, the first of them with a_i.

    Writes zeros where a row has no such rank, so the workspace needs no memset.
    """
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    page = tl.program_id(1)
    split = tl.program_id(2)
    per_split = tl.cdiv(tl.cdiv(K, splits), BLOCK_K) * BLOCK_K
    k_from = split * per_split
    k_to = tl.minimum(k_from + per_split, K)
    inside = position < M
    row, id = _locate(position, inside, order, ids, M, MANY)
    r = page * PAGE + tl.arange(0, PAGE)
    x_row = x + row * stride_xm
    if MANY:
        rank = tl.load(rows + id * 4 + 1, mask=id >= 0, other=0)
        bias = tl.load(biases + id * 2, mask=id >= 0, other=0)
        id = tl.where(rank > page * PAGE, id, -1)
    else:
        rank = tl.where(inside, one_rank, 0)
        bias = tl.where(inside, one_bias_A, 0)

    total = tl.zeros((BLOCK_M, PAGE), tl.float32)
    if MANY:
        segments = tl.sum(_is_head(position, id, ids, BLOCK_M).to(tl.int32))
        if segments > BLOCK_M // 4:
            STEP: tl.constexpr = 512 // BLOCK_M
            first = tl.load(rows + id * 4, mask=id >= 0, other=0)
            entry = pages + (first + page) * 5
            base = tl.load(entry, mask=id >= 0, other=0).to(tl.pointer_type(DTYPE))
            stride = tl.load(entry + 1, mask=id >= 0, other=0)
            own = (id >= 0)[:, None] & (r[None, :] < rank[:, None])
            A_row = base[:, None] + tl.arange(0, PAGE).to(tl.int64)[None, :] * stride[:, None]
            if ALIGNED:
                A_row = tl.multiple_of(A_row, [1, 16])
            for k_start in range(k_from, k_to, STEP):
                k = k_start + tl.arange(0, STEP)
                x_tile = tl.load(
                    x_row[:, None] + k[None, :].to(tl.int64) * stride_xk,
                    mask=(id >= 0)[:, None] & (k < K)[None, :],
                    other=0.0,
                )
                if DROPOUT:
                    x_tile = tl.where(keep(seed, row, k_start, K, threshold, QUADS, STEP), x_tile, 0.0)
                A_tile = tl.load(A_row[:, :, None] + k[None, None, :], mask=own[:, :, None] & (k < K)[None, None, :], other=0.0)
                total += tl.sum(x_tile.to(tl.float32)[:, None, :] * A_tile.to(tl.float32), axis=2)
        else:
            i = _next_id(id, -1)
            while i < _NO_ID:
                entry = pages + (tl.load(rows + i * 4) + page) * 5
                own = id == i
                part = _segment_shrink(
                    x_row, row, own, tl.load(entry), tl.load(entry + 1), r < tl.load(rows + i * 4 + 1), k_from, k_to, K,
                    stride_xk, seed, threshold, DTYPE, ALIGNED, DROPOUT, QUADS, BLOCK_M, BLOCK_K,
                )  # fmt: skip
                total = tl.where(own[:, None], part, total)
                i = _next_id(id, i)
    else:
        address = one_A + page * PAGE * one_stride_A * (DTYPE.primitive_bitwidth // 8)
        total = _segment_shrink(
            x_row, row, inside, address, one_stride_A, r < one_rank, k_from, k_to, K,
            stride_xk, seed, threshold, DTYPE, ALIGNED, DROPOUT, QUADS, BLOCK_M, BLOCK_K,
        )  # fmt: skip

    if DROPOUT:
        total *= keep_scale
    if split == 0:
        bias_row = bias.to(tl.pointer_type(DTYPE))
        own = (bias != 0)[:, None] & (r[None, :] < rank[:, None])
        total += tl.load(bias_row[:, None] + r[None, :], mask=own, other=0.0).to(tl.float32)
    z_row = z + (split.to(tl.int64) * M + row) * z_width
    tl.store(z_row[:, None] + r[None, :], total, mask=inside[:, None])


@triton.jit
def _segment_shrink(
    x_row,
    row,
    own,
    address,
    stride,
    has_rank,
    k_from,
    k_to,
    K,
    stride_xk,
    seed,
    threshold,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, PAGE]: x̃ times one page of one adapter, for the rows that are its own."""
    A_row = address.to(tl.pointer_type(DTYPE)) + tl.arange(0, PAGE).to(tl.int64) * stride
    if ALIGNED:
        A_row = tl.multiple_of(A_row, 16)  # an address from memory carries no such fact
    part = tl.zeros((BLOCK_M, PAGE), tl.float32)
    for k_start in range(k_from, k_to, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x_row[:, None] + k[None, :].to(tl.int64) * stride_xk, mask=own[:, None] & (k < K)[None, :], other=0.0
        )
        if DROPOUT:
            # x̃ · (1 - p), a value of x's dtype; the division comes after the sum
            x_tile = tl.where(keep(seed, row, k_start, K, threshold, QUADS, BLOCK_K), x_tile, 0.0)
        A_tile = tl.load(A_row[None, :] + k[:, None], mask=has_rank[None, :] & (k < K)[:, None], other=0.0)
        part = dot(x_tile, A_tile, part)
    return part


@triton.jit(do_not_specialize=_VARYING)
def expand_kernel(
    x,
    weight,
    bias,
    y,
    z,
    order,
    ids,
    pages,
    rows,
    scaling,
    biases,
    one_B: tl.int64,
    one_stride_Bn: tl.int64,
    one_stride_Br: tl.int64,
    one_bias_B: tl.int64,
    one_rank: tl.int32,
    one_activation: tl.int32,
    one_scaling: tl.float32,
    M: tl.int32,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    z_width: tl.int32,
    splits: tl.int32,
    DTYPE: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile of y: the whole base product first, then the adapters of its rows on the fp32 accumulators."""
    # groups of GROUP_M row blocks share their column blocks of W in L2
    tile = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    group_from = tile // (GROUP_M * blocks_n) * GROUP_M
    group_size = tl.minimum(blocks_m - group_from, GROUP_M)
    block_m = group_from + tile % (GROUP_M * blocks_n) % group_size
    block_n = tile % (GROUP_M * blocks_n) // group_size

    position = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = position < M
    row, id = _locate(position, inside, order, ids, M, MANY)
    x_row = x + row * stride_xm
    w_row = weight + tl.minimum(n, N - 1).to(tl.int64) * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x_row[:, None] + k[None, :].to(tl.int64) * stride_xk, mask=(k < K)[None, :], other=0.0)
        w_tile = tl.load(w_row[None, :] + k[:, None].to(tl.int64) * stride_wk, mask=(k < K)[:, None], other=0.0)
        acc = dot(x_tile, w_tile, acc)

    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    z_row = z + row * z_width
    z_split = M.to(tl.int64) * z_width
    if MANY:
        rank = tl.load(rows + id * 4 + 1, mask=id >= 0, other=0)
        cost = tl.where(_is_head(position, id, ids, BLOCK_M), tl.maximum(tl.cdiv(rank, PAGE), 1), 0)
        # by segment: a dot for each page of each segment; by row: a product for each rank. A dot counts as two ranks
        if tl.max(rank) < 2 * (tl.sum(cost) - 1):
            acc = _expand_by_row(
                acc, z_row, z_split, id, rank, n, N, pages, rows, scaling, biases, splits, DTYPE
            )  # fmt: skip
        else:
            i = _next_id(id, -1)
            while i < _NO_ID:
                own = id == i
                i_rank = tl.load(rows + i * 4 + 1)
                first = tl.load(rows + i * 4)
                code = tl.load(rows + i * 4 + 2)
                s = tl.load(scaling + i)
                delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for page in tl.range(0, tl.cdiv(i_rank, PAGE), num_stages=1):
                    entry = pages + (first + page) * 5
                    delta = _expand_page(
                        delta, z_row, z_split, own, page, i_rank, code, s, tl.load(entry + 2), tl.load(entry + 3),
                        tl.load(entry + 4), n, N, splits, DTYPE,
                    )  # fmt: skip
                delta += _bias_B(tl.load(biases + i * 2 + 1), n, N, DTYPE)[None, :]
                acc = tl.where(own[:, None], acc + delta, acc)
                i = _next_id(id, i)
    else:
        for page in tl.range(0, tl.cdiv(one_rank, PAGE), num_stages=1):
            address = one_B + page * PAGE * one_stride_Br * (DTYPE.primitive_bitwidth // 8)
            acc = _expand_page(
                acc, z_row, z_split, inside, page, one_rank, one_activation, one_scaling, address, one_stride_Bn,
                one_stride_Br, n, N, splits, DTYPE,
            )  # fmt: skip
        acc += _bias_B(one_bias_B, n, N, DTYPE)[None, :]

    y_tile = y + row[:, None] * N + n[None, :]
    tl.store(y_tile, round_to(acc, y.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@triton.jit
def _bias_B(address, n, N, DTYPE: tl.constexpr):
    """β [BLOCK_N] in fp32, zeros where there is none."""
    columns = tl.where(address != 0, N, 0)
    return tl.load(address.to(tl.pointer_type(DTYPE)) + n, mask=n < columns, other=0.0).to(tl.float32)


@triton.jit
def _load_z(pointer, mask, z_split, splits):
    """The sum of z's partial sums, always in the same order."""
    total = tl.load(pointer, mask=mask, other=0.0)
    for split in range(1, splits):
        total += tl.load(pointer + split * z_split, mask=mask, other=0.0)
    return total


@triton.jit
def _expand_page(
    acc, z_row, z_split, own, page, rank, code, s, address, stride_n, stride_r, n, N, splits, DTYPE: tl.constexpr
):
    """acc + s · act(z) Bᵀ over one page of one adapter, for the rows that are its own (the others get 0 or NaN)."""
    lane = tl.arange(0, PAGE)
    r = page * PAGE + lane
    v = _load_z(z_row[:, None] + r[None, :], own[:, None] & (r < rank)[None, :], z_split, splits)
    if code > 0:
        v = activate(v, code)
    B_row = address.to(tl.pointer_type(DTYPE)) + lane.to(tl.int64) * stride_r
    B_tile = tl.load(
        B_row[:, None] + n[None, :].to(tl.int64) * stride_n, mask=(r < rank)[:, None] & (n < N)[None, :], other=0.0
    )
    return dot(v * s, B_tile, acc)


@triton.jit
def _expand_by_row(
    acc, z_row, z_split, id, rank, n, N, pages, rows, scaling, biases, splits, DTYPE: tl.constexpr
):
    """acc + s · act(z) Bᵀ + β where each row reads its own adapter: BLOCK_N products a row and rank, no dots."""
    some = id >= 0
    first = tl.load(rows + id * 4, mask=some, other=0)
    code = tl.load(rows + id * 4 + 2, mask=some, other=0)
    s = tl.load(scaling + id, mask=some, other=0.0)
    curved = tl.max(code) > 0
    for page in tl.range(0, tl.cdiv(tl.max(rank), PAGE), num_stages=1):
        on_page = rank > page * PAGE
        entry = pages + (first + page) * 5
        address = tl.load(entry + 2, mask=on_page, other=0)
        stride_n = tl.load(entry + 3, mask=on_page, other=0)
        stride_r = tl.load(entry + 4, mask=on_page, other=0)
        B_row = address.to(tl.pointer_type(DTYPE))
        for lane in tl.range(0, tl.minimum(tl.max(rank) - page * PAGE, PAGE), num_stages=1):
            r = page * PAGE + lane
            own = r < rank
            v = _load_z(z_row + r, own, z_split, splits)
            if curved:
                v = activate(v, code)
            pointer = (B_row + lane * stride_r)[:, None] + n[None, :].to(tl.int64) * stride_n[:, None]
            B_tile = tl.load(pointer, mask=own[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
            acc += (v * s)[:, None] * B_tile
    beta = tl.load(biases + id * 2 + 1, mask=some, other=0)
    if tl.max(beta) != 0:
        pointer = beta.to(tl.pointer_type(DTYPE))[:, None] + n[None, :]
        acc += tl.load(pointer, mask=(beta != 0)[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
    return acc


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
    shrink = config.shrink(M, x.dtype, adapters.dtype, where)
    splits = config.splits(M, K, z_width, shrink) if M and z_width else 1
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    z = torch.empty(splits, M, z_width, dtype=torch.float32, device=x.device)
    if M:
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            if z_width:
                _launch_shrink(x, z, adapters, segments, dropout_p, seed, shrink)
            if N:
                expand = config.expand(M, segments is not None, x.dtype, weight.dtype, where)
                _launch_expand(x, weight, bias, y, z, adapters, segments, expand)
    if not save_z:
        return y, None
    return y, z[0] if splits == 1 else z.sum(0)


def _launch_shrink(
    x: Tensor,
    z: Tensor,
    adapters: Adapters,
    segments: Segments | None,
    dropout_p: float,
    seed: Tensor | None,
    block: config.Shrink,
) -> None:
    splits, M, z_width = z.shape
    K = x.shape[1]
    one, many = _source(adapters)
    threshold = dropout_threshold(dropout_p)
    shrink_kernel[(triton.cdiv(M, block.BLOCK_M), z_width // PAGE.value, splits)](
        x, z, segments and segments.order, segments and segments.ids, seed if dropout_p else None,
        many and many.pages, many and many.rows, many and many.biases, one.A, one.stride_A, one.bias_A, one.rank,
        M, K, x.stride(0), x.stride(1), z_width, splits,
        threshold - 2**32 if threshold >= 2**31 else threshold, 1.0 / (1.0 - dropout_p),
        DTYPE=DTYPES[adapters.dtype], MANY=many is not None, ALIGNED=adapters.aligned, DROPOUT=dropout_p > 0.0,
        QUADS=K % 4 == 0, **block._asdict(),
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
) -> None:
    splits, M, z_width = z.shape
    N, K = weight.shape
    one, many = _source(adapters)
    expand_kernel[(triton.cdiv(M, block.BLOCK_M) * triton.cdiv(N, block.BLOCK_N),)](
        x, weight, bias, y, z, segments and segments.order, segments and segments.ids,
        many and many.pages, many and many.rows, many and many.scaling, many and many.biases,
        one.B, one.stride_Bn, one.stride_Br, one.bias_B, one.rank, one.activation, one.scaling,
        M, N, K, x.stride(0), x.stride(1), weight.stride(0), weight.stride(1), z_width, splits,
        DTYPE=DTYPES[adapters.dtype], MANY=many is not None, **block._asdict(),
    )  # fmt: skip


def _source(adapters: Adapters) -> tuple[One, Many | None]:
    source = adapters.source
    return (NOTHING, source) if isinstance(source, Many) else (source, None)
