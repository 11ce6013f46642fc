"""expand: y[m] = x[m] Wᵀ + bias + s_i · act(z[m]) B_iᵀ + β_i: the base GEMM, the adapter on its fp32 accumulators."""

import triton
import triton.language as tl

from .arithmetic import activate, dot, leading, remainder, round_to
from .segments import PAGE, rows_at, segment_heads

# Arguments that change between calls and would otherwise each compile again for 1, or for a multiple of 16.
_VARYING = ["one_B", "one_stride_Bn", "one_stride_Br", "one_bias_B", "one_rank", "one_activation", "one_scaling"]
_VARYING += ["M", "z_pages", "splits"]


@triton.jit(do_not_specialize=_VARYING)
def expand_kernel(
    x, weight, bias, y, z, order, ids, ends, pages, rows, scaling, biases,
    one_B: tl.int64, one_stride_Bn: tl.int64, one_stride_Br: tl.int64, one_bias_B: tl.int64,
    one_rank: tl.int32, one_activation: tl.int32, one_scaling: tl.float32,
    M: tl.int32, N, K, stride_xm, stride_xk, stride_wn, stride_wk, z_pages: tl.int32, splits: tl.int32,
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
    row = rows_at(position, order, M, MANY)
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
    z_row = z + row * (z_pages * PAGE)
    z_split = M.to(tl.int64) * (z_pages * PAGE)
    if MANY:
        at = tl.maximum(block_from, tl.load(ends))
        if BY_ROW:
            # by segment: a dot for each page of each segment; by row: a product for each rank. A dot costs two ranks
            id = tl.load(ids + position, mask=position < M, other=-1)
            rank = tl.load(rows + id * 4 + 1, mask=id >= 0, other=0)
            heads = segment_heads(position, id, ids, BLOCK_M)
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
    """acc + v·B by the kind of products that made acc: `arithmetic.dot_terms`, term after term in a loop.

    The loop is not unrolled: every product in the code has its own accumulators in Blackwell's tensor memory, where
    there is room for two tiles of 128 · 256, and terms that wait for their turn take registers from the sums.
    """
    if IEEE:
        acc = dot(v, B_tile.to(tl.float32), acc)
    elif B_tile.dtype == tl.bfloat16:
        acc = _dot_v_term(v, B_tile, acc)
    else:
        rest = B_tile.to(tl.float32)
        for _ in tl.range(0, 3 if B_tile.dtype == tl.float32 else 2, num_stages=1):
            term = leading(rest)
            acc = _dot_v_term(v, term.to(tl.bfloat16), acc)
            rest = remainder(rest, term)
    return acc


@triton.jit
def _dot_v_term(v, B_term, acc):
    rest = v
    for _ in tl.range(0, 3, num_stages=1):
        term = leading(rest)
        acc = dot(term.to(tl.bfloat16), B_term, acc)
        rest = remainder(rest, term)
    return acc


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
    # an address that is an argument arrives as int32 where it is small
    pointer = address.to(tl.int64).to(tl.pointer_type(DTYPE)) + lane[:, None].to(tl.int64) * stride_r
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
