"""shrink: the product with the low-rank side of the adapters, for some ranks of a block of rows.

Forward: z[m] = x̃[m] A_iᵀ + a_i. Backward, where x is dY: u[m] = (dY[m] B_i) ⊙ act'(z[m]).

"down" is the matrix that x is multiplied with: A in the forward, B in the backward.
"""

import triton
import triton.language as tl

from .arithmetic import activation_slope, dot, to_field
from .philox import keep_mask
from .segments import PAGE, rows_at, segment_heads
from .tickets import sum_of_splits


@triton.jit
def shrink_tile(
    tile, x, out, z, partials, arrivals, order, ids, starts, owners, blocks, seed,
    pages, rows, biases, slices, adapters,
    one_down, one_down_r, one_down_k, one_bias, one_rank, one_code,
    M, K, stride_xm, stride_xk, stride_zm, z_pages, splits, dense, threshold, keep_scale,
    DTYPE: tl.constexpr, MANY: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, DOWN: tl.constexpr,
    DROPOUT: tl.constexpr, QUADS: tl.constexpr, FIELD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Computes one split of one tile of `out` [M, z_pages · 16], BLOCK_M rows by BLOCK_R ranks.

    Returns whether the tile is complete. dense: write 0 where a row has no such rank, so that all of `out` is written;
    otherwise those elements are left unchanged. FIELD: None, or the dtype that `down` is rounded to.
    """
    split = tile % splits
    tile = tile // splits
    rank_blocks = tl.cdiv(z_pages * PAGE, BLOCK_R)
    block_from = tile // rank_blocks * BLOCK_M
    block_to = tl.minimum(block_from + BLOCK_M, M)
    first = tile % rank_blocks * BLOCK_R  # the tile's first rank, counted over all of `out`
    place = first + tl.arange(0, BLOCK_R)
    position = block_from + tl.arange(0, BLOCK_M)
    row = rows_at(position, order, M, MANY)

    entry = 0  # of adapter 0 in rows and biases
    from_k = 0
    to_k = K
    if PACKED > 0:
        # slices: first column and first page of z of each, and one more entry where the last slice ends
        slice = 0
        while tl.load(slices + slice * 2 + 3) * PAGE <= first:
            slice += 1
        entry = slice * adapters
        first -= tl.load(slices + slice * 2 + 1) * PAGE  # the tile's first rank, counted in its slice
        if BACKWARD:
            from_k = tl.multiple_of(tl.load(slices + slice * 2), PACKED)
            to_k = tl.load(slices + slice * 2 + 2)
    r = first + tl.arange(0, BLOCK_R)
    per_split = tl.cdiv(tl.cdiv(to_k - from_k, splits), BLOCK_K) * BLOCK_K
    k_from = tl.minimum(split * per_split, to_k - from_k)
    k_to = tl.minimum(k_from + per_split, to_k - from_k)
    x_row = x + row * stride_xm + from_k * stride_xk

    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if MANY:
        tl.static_assert(BLOCK_R == PAGE)
        id = tl.load(ids + position, mask=position < M, other=-1)
        rank = tl.load(rows + (entry + id) * 4 + 1, mask=id >= 0, other=0)
        if tl.sum(segment_heads(position, id, ids, BLOCK_M).to(tl.int32)) > BLOCK_M // 4:
            total = _shrink_by_row(
                x_row, row, entry + id, r, rank, pages, rows, k_from, k_to, K, stride_xk, seed, threshold,
                DTYPE, BACKWARD, DOWN, DROPOUT, QUADS, STEP,
            )  # fmt: skip
        else:
            segment = tl.load(blocks + block_from // 16)
            at = tl.load(starts + segment)
            while at < block_to:
                i = tl.load(owners + segment)
                segment += 1
                end = tl.load(starts + segment)
                if i >= 0:
                    segment_rank = tl.load(rows + (entry + i) * 4 + 1)
                    if segment_rank > first:
                        page = pages + (tl.load(rows + (entry + i) * 4) + first // PAGE) * 5
                        down_r, down_k = 0, 0
                        if BACKWARD:
                            down_r = tl.load(page + 4)
                            down_k = tl.load(page + 3)
                        else:
                            down_r = tl.load(page + 1)
                        own = (position >= at) & (position < end)
                        part = _shrink_segment(
                            x_row, row, own, tl.load(page + 2 * BACKWARD), down_r, down_k, r < segment_rank,
                            k_from, k_to, K, stride_xk, seed, threshold,
                            DTYPE, DOWN, DROPOUT, QUADS, FIELD, BLOCK_M, BLOCK_K, BLOCK_R,
                        )  # fmt: skip
                        total = tl.where(own[:, None], part, total)
                at = end
        mine = (position < M)[:, None] & (r[None, :] < rank[:, None])
    else:
        total = _shrink_segment(
            x_row, row, position < M, one_down + first * one_down_r * (DTYPE.primitive_bitwidth // 8),
            one_down_r, one_down_k, r < one_rank, k_from, k_to, K, stride_xk, seed, threshold,
            DTYPE, DOWN, DROPOUT, QUADS, FIELD, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        mine = (position < M)[:, None] & (r < one_rank)[None, :]

    complete = splits == 1
    if splits > 1:
        total, complete = sum_of_splits(total, partials, tile, split, splits, arrivals)
    if complete:
        z_width = z_pages * PAGE
        offset = row[:, None] * z_width + place[None, :]
        offset_z = row[:, None] * stride_zm + place[None, :]
        if DROPOUT:
            total *= keep_scale
        if MANY:
            if BACKWARD:
                code = tl.load(rows + (entry + id) * 4 + 2, mask=id >= 0, other=0)
                if tl.max(code) > 0:
                    total *= activation_slope(tl.load(z + offset_z, mask=mine, other=0.0), code[:, None])
            else:
                bias = tl.load(biases + (entry + id) * 2, mask=id >= 0, other=0)
                pointer = bias.to(tl.pointer_type(DTYPE))[:, None] + r[None, :]
                total += tl.load(pointer, mask=mine & (bias != 0)[:, None], other=0.0).to(tl.float32)
        else:
            if BACKWARD:
                if one_code > 0:
                    total *= activation_slope(tl.load(z + offset_z, mask=mine, other=0.0), one_code)
            else:
                ranks = tl.where(one_bias != 0, one_rank, 0)
                pointer = one_bias.to(tl.int64).to(tl.pointer_type(DTYPE)) + r
                total += tl.load(pointer, mask=r < ranks, other=0.0).to(tl.float32)[None, :]
        everywhere = position < tl.where(dense != 0, M, 0)
        tl.store(out + offset, total, mask=mine | (everywhere[:, None] & (place < z_width)[None, :]))
    return complete


@triton.jit
def _shrink_segment(
    x_row, row, own, address, down_r, down_k, ranks, k_from, k_to, K, stride_xk, seed, threshold,
    DTYPE: tl.constexpr, DOWN: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr, FIELD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_R]: x̃ · down for some ranks of one adapter, 0 in rows that do not use it (own is False)."""
    lane = tl.arange(0, BLOCK_R).to(tl.int64)
    # an address passed as an argument arrives as int32 when it is small
    down = address.to(tl.int64).to(tl.pointer_type(DTYPE))
    part = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k_start in range(k_from, k_to, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x_row[:, None] + k[None, :].to(tl.int64) * stride_xk, mask=own[:, None] & (k < k_to)[None, :], other=0.0
        )
        if DROPOUT:
            # this is x̃ · (1 - p), exact in x's dtype; the division comes after the sum
            x_tile = tl.where(keep_mask(seed, row, k_start, K, threshold, QUADS, BLOCK_K), x_tile, 0.0)
        pointer = _down_pointer(down, lane[None, :], k[:, None], down_r, down_k, DOWN)
        down_tile = tl.load(pointer, mask=ranks[None, :] & (k < k_to)[:, None], other=0.0)
        if FIELD is not None:
            down_tile = to_field(down_tile, FIELD)
        part = dot(x_tile, down_tile, part)
    return part


@triton.jit
def _shrink_by_row(
    x_row, row, entry, r, rank, pages, rows, k_from, k_to, K, stride_xk, seed, threshold,
    DTYPE: tl.constexpr, BACKWARD: tl.constexpr, DOWN: tl.constexpr,
    DROPOUT: tl.constexpr, QUADS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """[rows, PAGE]: x̃ · down over one page, where each row reads its own adapter, without dots.

    [rows, PAGE, STEP] products are held in registers.
    """
    lane = tl.arange(0, PAGE).to(tl.int64)
    own = r[None, :] < rank[:, None]
    has_rank = tl.min(r) < rank
    page = pages + (tl.load(rows + entry * 4, mask=has_rank, other=0) + tl.min(r) // PAGE) * 5
    down = tl.load(page + 2 * BACKWARD, mask=has_rank, other=0).to(tl.pointer_type(DTYPE))
    down_r = tl.load(page + (4 if BACKWARD else 1), mask=has_rank, other=0)
    down_k = tl.load(page + 3, mask=has_rank, other=0) if BACKWARD else down_r  # A's rows are contiguous (see DOWN)
    total = tl.zeros((row.shape[0], PAGE), tl.float32)
    for k_start in tl.range(k_from, k_to, STEP, num_stages=1):
        k = k_start + tl.arange(0, STEP)
        mask = has_rank[:, None] & (k < k_to)[None, :]
        x_tile = tl.load(x_row[:, None] + k[None, :].to(tl.int64) * stride_xk, mask=mask, other=0.0)
        if DROPOUT:
            x_tile = tl.where(keep_mask(seed, row, k_start, K, threshold, QUADS, STEP), x_tile, 0.0)
        pointer = _down_pointer(
            down[:, None, None], lane[None, :, None], k[None, None, :],
            down_r[:, None, None], down_k[:, None, None], DOWN,
        )  # fmt: skip
        down_tile = tl.load(pointer, mask=own[:, :, None] & (k < k_to)[None, None, :], other=0.0)
        total += tl.sum(x_tile.to(tl.float32)[:, None, :] * down_tile.to(tl.float32), axis=2)
    return total


@triton.jit
def _down_pointer(down, lane, k, down_r, down_k, DOWN: tl.constexpr):
    """down + lane · down_r + k · down_k. DOWN tells the compiler the layout, which it cannot see in a loaded address.

    "k": each rank's elements are contiguous along k. "k16": also, every rank starts on 16 bytes. "r16": the ranks of
    each k are contiguous, and every k starts on 16 bytes. "any": nothing is known.
    """
    THREE: tl.constexpr = len(k.shape) == 3
    if DOWN == "k16":
        pointer = tl.multiple_of(down + lane * down_r, [16, 16, 16] if THREE else [16, 16]) + k
    elif DOWN == "k":
        pointer = down + lane * down_r + k
    elif DOWN == "r16":
        pointer = tl.multiple_of(down + k.to(tl.int64) * down_k, [16, 16, 16] if THREE else [16, 16]) + lane
    else:
        pointer = down + lane * down_r + k.to(tl.int64) * down_k
    return pointer
