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
from .arithmetic import INTERPRETED, activate, dot, dot_terms, round_to
from .philox import keep
from .segments import Segments

PAGE = tl.constexpr(16)


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
def _rows(position, order, M, MANY: tl.constexpr):
    """The original rows (int64) at sorted positions; positions from M on get a row that exists."""
    place = tl.minimum(position, M - 1)
    return tl.load(order + place) if MANY else place.to(tl.int64)


@triton.jit
def _segment_heads(position, id, ids, BLOCK_M: tl.constexpr):
    """True at the first row of each segment of a block, base rows excepted."""
    before = tl.load(ids + position - 1, mask=(tl.arange(0, BLOCK_M) > 0) & (id >= 0), other=-1)
    return (id >= 0) & (id != before)


@triton.jit(do_not_specialize=_VARYING)
def shrink_kernel(
    x, z, order, ids, ends, seed, pages, rows, biases,
    one_A: tl.int64, one_stride_A: tl.int64, one_bias_A: tl.int64, one_rank: tl.int32,
    M: tl.int32, K, stride_xm, stride_xk, z_width: tl.int32, splits: tl.int32,
    threshold: tl.int32, keep_scale: tl.float32,
    DTYPE: tl.constexpr, MANY: tl.constexpr, ALIGNED: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One page of z for one block of rows over one range of K: partial sums, the first of them with a_i.

    Writes zeros where a row has no such rank, so the workspace needs no memset.
    """
    block_from = tl.program_id(0) * BLOCK_M
    block_to = tl.minimum(block_from + BLOCK_M, M)
    page = tl.program_id(1)
    split = tl.program_id(2)
    per_split = tl.cdiv(tl.cdiv(K, splits), BLOCK_K) * BLOCK_K
    k_from = split * per_split
    k_to = tl.minimum(k_from + per_split, K)
    position = block_from + tl.arange(0, BLOCK_M)
    row = _rows(position, order, M, MANY)
    r = page * PAGE + tl.arange(0, PAGE)
    total = tl.zeros((BLOCK_M, PAGE), tl.float32)
    if MANY:
        id = tl.load(ids + position, mask=position < M, other=-1)
        if tl.sum(_segment_heads(position, id, ids, BLOCK_M).to(tl.int32)) > BLOCK_M // 4:
            total = _shrink_by_row(
                x, row, id, page, split, k_from, k_to, K, stride_xm, stride_xk, pages, rows, biases,
                seed, threshold, keep_scale, DTYPE, ALIGNED, DROPOUT, QUADS, BLOCK_M,
            )  # fmt: skip
        else:
            at = tl.maximum(block_from, tl.load(ends))
            while at < block_to:
                i = tl.load(ids + at)
                end = tl.load(ends + 1 + i)
                rank = tl.load(rows + i * 4 + 1)
                if rank > page * PAGE:
                    entry = pages + (tl.load(rows + i * 4) + page) * 5
                    own = (position >= at) & (position < end)
                    part = _shrink_segment(
                        x, row, own, tl.load(entry), tl.load(entry + 1), tl.load(biases + i * 2), r, rank,
                        split, k_from, k_to, K, stride_xm, stride_xk,
                        seed, threshold, keep_scale, DTYPE, ALIGNED, DROPOUT, QUADS, BLOCK_M, BLOCK_K,
                    )  # fmt: skip
                    total = tl.where(own[:, None], part, total)
                at = end
    else:
        address = one_A + page * PAGE * one_stride_A * (DTYPE.primitive_bitwidth // 8)
        total = _shrink_segment(
            x, row, position < M, address, one_stride_A, one_bias_A, r, one_rank,
            split, k_from, k_to, K, stride_xm, stride_xk,
            seed, threshold, keep_scale, DTYPE, ALIGNED, DROPOUT, QUADS, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    z_row = z + (split.to(tl.int64) * M + row) * z_width
    tl.store(z_row[:, None] + r[None, :], total, mask=(position < M)[:, None])


@triton.jit
def _shrink_segment(
    x, row, own, address, stride, bias, r, rank, split, k_from, k_to, K, stride_xm, stride_xk,
    seed, threshold, keep_scale,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, PAGE]: x̃Aᵀ + a over one page of one adapter, for the rows that are its own."""
    x_row = x + row * stride_xm
    A_row = address.to(tl.pointer_type(DTYPE)) + tl.arange(0, PAGE).to(tl.int64) * stride
    if ALIGNED:
        A_row = tl.multiple_of(A_row, 16)  # bytes; an address from memory carries no such fact
    part = tl.zeros((BLOCK_M, PAGE), tl.float32)
    for k_start in range(k_from, k_to, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        mask = own[:, None] & (k < K)[None, :]
        x_tile = tl.load(x_row[:, None] + k[None, :].to(tl.int64) * stride_xk, mask=mask, other=0.0)
        if DROPOUT:
            # x̃ · (1 - p), a value of x's dtype; the division comes after the sum
            x_tile = tl.where(keep(seed, row, k_start, K, threshold, QUADS, BLOCK_K), x_tile, 0.0)
        A_tile = tl.load(A_row[None, :] + k[:, None], mask=(r < rank)[None, :] & (k < K)[:, None], other=0.0)
        part = dot(x_tile, A_tile, part)
    if DROPOUT:
        part *= keep_scale
    if split == 0:
        ranks = tl.where(bias != 0, rank, 0)
        part += tl.load(bias.to(tl.int64).to(tl.pointer_type(DTYPE)) + r, mask=r < ranks, other=0.0).to(tl.float32)[
            None, :
        ]
    return part


@triton.jit
def _shrink_by_row(
    x, row, id, page, split, k_from, k_to, K, stride_xm, stride_xk, pages, rows, biases,
    seed, threshold, keep_scale,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, PAGE]: x̃A_iᵀ + a_i over one page, where each row reads its own adapter: no dots."""
    # [rows, 16 ranks, STEP] in registers: as wide as these allow, half of it where loads are not of 8 halves at a time
    NARROW: tl.constexpr = not ALIGNED or x.dtype.element_ty == tl.float32 or DTYPE.primitive_bitwidth == 32
    STEP: tl.constexpr = (8 if BLOCK_M > 16 else 32) // (2 if NARROW else 1)
    r = page * PAGE + tl.arange(0, PAGE)
    rank = tl.load(rows + id * 4 + 1, mask=id >= 0, other=0)
    some = rank > page * PAGE
    own = r[None, :] < rank[:, None]
    entry = pages + (tl.load(rows + id * 4, mask=some, other=0) + page) * 5
    address = tl.load(entry, mask=some, other=0)
    stride = tl.load(entry + 1, mask=some, other=0)
    x_row = x + row * stride_xm
    A_row = address.to(tl.pointer_type(DTYPE))[:, None] + tl.arange(0, PAGE).to(tl.int64)[None, :] * stride[:, None]
    if ALIGNED:
        A_row = tl.multiple_of(A_row, [1, 16])
    total = tl.zeros((BLOCK_M, PAGE), tl.float32)
    for k_start in tl.range(k_from, k_to, STEP, num_stages=1):
        k = k_start + tl.arange(0, STEP)
        mask = some[:, None] & (k < K)[None, :]
        x_tile = tl.load(x_row[:, None] + k[None, :].to(tl.int64) * stride_xk, mask=mask, other=0.0)
        if DROPOUT:
            x_tile = tl.where(keep(seed, row, k_start, K, threshold, QUADS, STEP), x_tile, 0.0)
        A_mask = own[:, :, None] & (k < K)[None, None, :]
        A_tile = tl.load(A_row[:, :, None] + k[None, None, :], mask=A_mask, other=0.0)
        total += tl.sum(x_tile.to(tl.float32)[:, None, :] * A_tile.to(tl.float32), axis=2)
    if DROPOUT:
        total *= keep_scale
    if split == 0:
        bias = tl.load(biases + id * 2, mask=some, other=0)
        bias_row = bias.to(tl.pointer_type(DTYPE))[:, None]
        total += tl.load(bias_row + r[None, :], mask=own & (bias != 0)[:, None], other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=_VARYING)
def expand_kernel(
    x, weight, bias, y, z, order, ids, ends, pages, rows, scaling, biases,
    one_B: tl.int64, one_stride_Bn: tl.int64, one_stride_Br: tl.int64, one_bias_B: tl.int64,
    one_rank: tl.int32, one_activation: tl.int32, one_scaling: tl.float32,
    M: tl.int32, N, K, stride_xm, stride_xk, stride_wn, stride_wk, z_width: tl.int32, splits: tl.int32,
    DTYPE: tl.constexpr, MANY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """A tile of y: the whole base product first, then the adapters of its rows on the fp32 accumulators."""
    # groups of GROUP_M row blocks share their column blocks of W in L2
    tile = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    group_from = tile // (GROUP_M * blocks_n) * GROUP_M
    group_size = tl.minimum(blocks_m - group_from, GROUP_M)
    block_m = group_from + tile % (GROUP_M * blocks_n) % group_size
    block_n = tile % (GROUP_M * blocks_n) // group_size

    block_from = block_m * BLOCK_M
    block_to = tl.minimum(block_from + BLOCK_M, M)
    position = block_from + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = _rows(position, order, M, MANY)
    x_row = x + row * stride_xm
    w_row = weight + tl.minimum(n, N - 1).to(tl.int64) * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x_row[:, None] + k[None, :].to(tl.int64) * stride_xk, mask=(k < K)[None, :], other=0.0)
        w_tile = tl.load(w_row[None, :] + k[:, None].to(tl.int64) * stride_wk, mask=(k < K)[:, None], other=0.0)
        acc = dot(x_tile, w_tile, acc)

    if bias is not None:
        acc += tl.sum(_load_columns(bias, n, N), axis=0)[None, :]
    IEEE: tl.constexpr = x.dtype.element_ty == tl.float32 and weight.dtype.element_ty == tl.float32
    z_row = z + row * z_width
    z_split = M.to(tl.int64) * z_width
    if MANY:
        at = tl.maximum(block_from, tl.load(ends))
        if BY_ROW:
            # by segment: a dot for each page of each segment; by row: a product for each rank. A dot costs two ranks
            id = tl.load(ids + position, mask=position < M, other=-1)
            rank = tl.load(rows + id * 4 + 1, mask=id >= 0, other=0)
            heads = _segment_heads(position, id, ids, BLOCK_M)
            dots = tl.sum(tl.where(heads, tl.maximum(tl.cdiv(rank, PAGE), 1), 0))
            max_rank = tl.max(rank)
            if max_rank < 2 * (dots - 1):
                acc = _expand_by_row(
                    acc, z_row, z_split, id, rank, max_rank, n, N, pages, rows, scaling, biases, splits, DTYPE
                )
                at = block_to  # no segment is left
        while at < block_to:
            i = tl.load(ids + at)
            end = tl.load(ends + 1 + i)
            acc = _expand_segment(
                acc, z_row, z_split, (position >= at) & (position < end), n, N, pages + tl.load(rows + i * 4) * 5,
                tl.load(rows + i * 4 + 1), tl.load(rows + i * 4 + 2), tl.load(scaling + i),
                tl.load(biases + i * 2 + 1), splits, DTYPE, IEEE,
            )  # fmt: skip
            at = end
    else:
        for page in tl.range(0, tl.cdiv(one_rank, PAGE), num_stages=1):
            r = page * PAGE + tl.arange(0, PAGE)
            mask = (position < M)[:, None] & (r < one_rank)[None, :]
            v = _load_v(z_row[:, None] + r[None, :], mask, z_split, splits, one_activation)
            address = one_B + page * PAGE * one_stride_Br * (DTYPE.primitive_bitwidth // 8)
            B_tile = _load_B(address, one_stride_Bn, one_stride_Br, one_rank - page * PAGE, n, N, DTYPE)
            acc = _dot_v(v * one_scaling, B_tile, acc, IEEE)
        columns = tl.where(one_bias_B != 0, N, 0)
        acc += tl.sum(_load_columns(one_bias_B.to(tl.int64).to(tl.pointer_type(DTYPE)), n, columns), axis=0)[None, :]

    y_tile = y + row[:, None] * N + n[None, :]
    tl.store(y_tile, round_to(acc, y.dtype.element_ty), mask=(position < M)[:, None] & (n < N)[None, :])


@triton.jit
def _expand_segment(
    acc, z_row, z_split, own, n, N, pages, rank, code, s, beta, splits, DTYPE: tl.constexpr, IEEE: tl.constexpr
):
    """acc + s · act(z) Bᵀ + β of one adapter, in the rows that are its own.

    The other rows enter the dots as v = 0, which adds nothing to them as long as B is finite. So B's inf and NaN are
    taken out of the dots, and come back as NaN in their columns of the adapter's own rows. (A second tile of sums
    to select from would keep inf apart from NaN, at the price of its registers.)
    """
    columns = _load_columns(beta.to(tl.pointer_type(DTYPE)), n, tl.where(beta != 0, N, 0))
    for page in tl.range(0, tl.cdiv(rank, PAGE), num_stages=1):
        entry = pages + page * 5
        r = page * PAGE + tl.arange(0, PAGE)
        B_tile = _load_B(tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4), rank - page * PAGE, n, N, DTYPE)
        finite = tl.abs(B_tile.to(tl.float32)) < float("inf")
        columns += tl.where(finite, 0.0, float("nan"))
        v = _load_v(z_row[:, None] + r[None, :], own[:, None] & (r < rank)[None, :], z_split, splits, code)
        acc = _dot_v(v * s, tl.where(finite, B_tile, 0.0), acc, IEEE)
    return tl.where(own[:, None], acc + tl.sum(columns, axis=0)[None, :], acc)


@triton.jit
def _expand_by_row(
    acc, z_row, z_split, id, rank, max_rank, n, N, pages, rows, scaling, biases, splits, DTYPE: tl.constexpr
):
    """acc + s · act(z) Bᵀ + β where each row reads its own adapter: BLOCK_N products a row and rank, no dots."""
    some = id >= 0
    first = tl.load(rows + id * 4, mask=some, other=0)
    code = tl.load(rows + id * 4 + 2, mask=some, other=0)
    s = tl.load(scaling + id, mask=some, other=0.0)
    for page in tl.range(0, tl.cdiv(max_rank, PAGE), num_stages=1):
        on_page = rank > page * PAGE
        entry = pages + (first + page) * 5
        B_row = tl.load(entry + 2, mask=on_page, other=0).to(tl.pointer_type(DTYPE))
        stride_n = tl.load(entry + 3, mask=on_page, other=0)
        stride_r = tl.load(entry + 4, mask=on_page, other=0)
        for lane in tl.range(0, tl.minimum(max_rank - page * PAGE, PAGE), num_stages=1):
            own = page * PAGE + lane < rank
            v = activate(_load_z(z_row + page * PAGE + lane, own, z_split, splits), code)
            pointer = (B_row + lane * stride_r)[:, None] + n[None, :].to(tl.int64) * stride_n[:, None]
            B_rank = tl.load(pointer, mask=own[:, None] & (n < N)[None, :], other=0.0)
            acc += (v * s)[:, None] * B_rank.to(tl.float32)
    beta = tl.load(biases + id * 2 + 1, mask=some, other=0)
    pointer = beta.to(tl.pointer_type(DTYPE))[:, None] + n[None, :]
    return acc + tl.load(pointer, mask=(beta != 0)[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _dot_v(v, B_tile, acc, IEEE: tl.constexpr):
    """acc + v·B by the kind of products that made acc, so that it stays in its registers as it is."""
    return dot(v, B_tile.to(tl.float32), acc) if IEEE else dot_terms(v, B_tile, acc)


@triton.jit
def _load_z(pointer, mask, z_split, splits):
    """The sum of z's partial sums, always in the same order; 0 where masked."""
    z = tl.load(pointer, mask=mask, other=0.0)
    for split in tl.range(1, splits, num_stages=1):
        z += tl.load(pointer + split * z_split, mask=mask, other=0.0)
    return z


@triton.jit
def _load_v(pointer, mask, z_split, splits, code):
    """act(z) in fp32 for one adapter's code; 0 where masked."""
    v = _load_z(pointer, mask, z_split, splits)
    if code > 0:
        v = activate(v, code)
    return v


@triton.jit
def _load_B(address, stride_n, stride_r, ranks, n, N, DTYPE: tl.constexpr):
    """One page of Bᵀ, [PAGE, BLOCK_N], zeros beyond its ranks."""
    lane = tl.arange(0, PAGE)
    pointer = address.to(tl.pointer_type(DTYPE)) + lane[:, None].to(tl.int64) * stride_r
    return tl.load(
        pointer + n[None, :].to(tl.int64) * stride_n, mask=(lane < ranks)[:, None] & (n < N)[None, :], other=0.0
    )


@triton.jit
def _load_columns(pointer, n, columns):
    """[PAGE, BLOCK_N] in fp32 to be summed over its rows: one value for each column, zeros from `columns` on.

    They lie in the first row of what looks like a page of B. A plain load would be made in the accumulators' layout,
    where each thread holds every fourth column and would spend two registers on the address of each.
    """
    lane = tl.arange(0, PAGE)
    mask = (lane == 0)[:, None] & (n < columns)[None, :]
    return tl.load(pointer + lane[:, None] * 0 + n[None, :], mask=mask, other=0.0).to(tl.float32)


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
    shrink = config.shrink(M, wide, dropout_p > 0.0, x.dtype, adapters.dtype, where)
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
        x, z, *(segments or (None, None, None)), seed if dropout_p else None,
        many and many.pages, many and many.rows, many and many.biases, one.A, one.stride_A, one.bias_A, one.rank,
        M, K, x.stride(0), x.stride(1), z_width, splits,
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
        x, weight, bias, y, z, *(segments or (None, None, None)),
        many and many.pages, many and many.rows, many and many.scaling, many and many.biases,
        one.B, one.stride_Bn, one.stride_Br, one.bias_B, one.rank, one.activation, one.scaling,
        M, N, K, x.stride(0), x.stride(1), weight.stride(0), weight.stride(1), z_width, splits,
        DTYPE=DTYPES[adapters.dtype], MANY=many is not None, **block._asdict(), **options,
    )  # fmt: skip


def _source(adapters: Adapters) -> tuple[One, Many | None]:
    source = adapters.source
    return (NOTHING, source) if isinstance(source, Many) else (source, None)
