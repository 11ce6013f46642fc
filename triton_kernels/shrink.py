"""shrink: z[m] = x̃[m] A_iᵀ + a_i, a page of 16 ranks at a time, into an fp32 workspace [splits, M, z_width]."""

import triton
import triton.language as tl

from .arithmetic import dot
from .philox import keep
from .segments import PAGE, rows_at, segment_heads

# Arguments that change between calls and would otherwise each compile again for 1, or for a multiple of 16.
_VARYING = ["one_A", "one_stride_A", "one_bias_A", "one_rank", "M", "z_pages", "splits", "threshold", "keep_scale"]


@triton.jit(do_not_specialize=_VARYING)
def shrink_kernel(
    x, z, order, ids, ends, seed, pages, rows, biases,
    one_A: tl.int64, one_stride_A: tl.int64, one_bias_A: tl.int64, one_rank: tl.int32,
    M: tl.int32, K, stride_xm, stride_xk, z_pages: tl.int32, splits: tl.int32,
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
    row = rows_at(position, order, M, MANY)
    r = page * PAGE + tl.arange(0, PAGE)
    total = tl.zeros((BLOCK_M, PAGE), tl.float32)
    if MANY:
        id = tl.load(ids + position, mask=position < M, other=-1)
        if tl.sum(segment_heads(position, id, ids, BLOCK_M).to(tl.int32)) > BLOCK_M // 4:
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
    z_row = z + (split.to(tl.int64) * M + row) * (z_pages * PAGE)
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
    # an address that is an argument arrives as int32 where it is small
    A_row = address.to(tl.int64).to(tl.pointer_type(DTYPE)) + tl.arange(0, PAGE).to(tl.int64) * stride
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
    STEP: tl.constexpr = 256 // BLOCK_M  # [rows, 16 ranks, STEP] lie in registers: 16 values a thread
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
