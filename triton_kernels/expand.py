"""expand: the base GEMM, with the adapter added to its fp32 accumulators.

Forward: y[m] = x[m] Wᵀ + bias + s_i · act(z[m]) B_iᵀ + β_i.
Backward: dX[m] = dY[m] W + mask/(1-p) ⊙ s_i · u[m] A_i. Here x is dY, W is transposed, and z is u.

"up" is the matrix that z is multiplied with: B in the forward, A in the backward. W = None is the identity: y = x + …,
a series adapter.
"""

import triton
import triton.language as tl

from .arithmetic import activate, dot, nearest_term, remainder, round_to, to_field
from .philox import keep_mask
from .segments import PAGE, rows_at, segment_heads
from .tickets import sum_of_splits, wait_for, wait_for_launch_before


@triton.jit
def expand_tile(
    tile, x, x_tiles, weight, bias, y, z, partials, arrivals, counters, order, ids, starts, owners, blocks, seed,
    pages, rows, scaling, biases, slices, slice_count, adapters,
    one_up, one_up_n, one_up_r, one_bias, one_rank, one_code, one_scaling,
    M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, z_pages, splits, ready, ready_rows, threshold, keep_scale,
    DTYPE: tl.constexpr, MANY: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, TICKETS: tl.constexpr,
    IEEE: tl.constexpr, FIELD: tl.constexpr, W_TILES: tl.constexpr, SPLIT: tl.constexpr, DROPOUT: tl.constexpr,
    QUADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BY_ROW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Computes one tile of y, or one split of it: first the whole base product, then the adapters of its rows.

    x_tiles is a tensor descriptor of x, or None. W_TILES: weight is a pointer to W (""), a tensor descriptor of W
    ("nk") or of Wᵀ ("kn"), or a pointer to the base layer's part of y [M, N] ("base"). ready: how many shrink tiles
    must be complete for every `ready_rows` rows of a row block. FIELD: None, or the dtype that v and up are rounded to.
    OVERLAP: the launch before this one, which writes z, may still run.
    """
    split = tile % splits
    tile = tile // splits
    # GROUP_M row blocks form a group, which shares column blocks of W in L2
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
    if W_TILES == "base":
        base = weight + row[:, None] * stride_wn + n[None, :].to(tl.int64) * stride_wk
        acc = tl.load(base, mask=(position < M)[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
    else:
        k_from = 0
        k_to = K
        if SPLIT:
            per_split = tl.cdiv(tl.cdiv(K, splits), BLOCK_K) * BLOCK_K
            k_from = tl.minimum(split * per_split, K)
            k_to = tl.minimum(k_from + per_split, K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        w_row = 0
        if W_TILES == "":
            w_row = weight + tl.minimum(n, N - 1).to(tl.int64) * stride_wn
        for k_start in range(k_from, k_to, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            if x_tiles is not None:
                x_tile = x_tiles.load([block_from, k_start])
            else:
                x_tile = tl.load(x_row[:, None] + k[None, :].to(tl.int64) * stride_xk, mask=(k < K)[None, :], other=0.0)
            if W_TILES == "kn":
                w_tile = weight.load([k_start, block_n * BLOCK_N])
            elif W_TILES == "nk":
                w_tile = tl.trans(weight.load([block_n * BLOCK_N, k_start]))
            else:
                w_tile = tl.load(w_row[None, :] + k[:, None].to(tl.int64) * stride_wk, mask=(k < K)[:, None], other=0.0)
            acc = dot(x_tile, w_tile, acc)

    complete = True
    if SPLIT:
        acc, complete = sum_of_splits(acc, partials, tile, split, splits, arrivals)
    if complete:
        if OVERLAP:
            wait_for_launch_before()
        if TICKETS:
            if z_pages > 0:
                wait_for(counters, block_m, ready * tl.cdiv(block_to - block_from, ready_rows))
        z_row = z + row * (z_pages * PAGE)
        # the dropout mask applies to the adapter's terms only, so they are summed separately
        OWN_SUMS: tl.constexpr = BACKWARD and DROPOUT
        delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if OWN_SUMS else acc
        if MANY:
            if PACKED > 0:
                for slice in tl.range(0, slice_count, num_stages=1):
                    at_slice = slices + slice * 2
                    from_n = 0
                    to_n = N
                    if not BACKWARD:
                        from_n = tl.multiple_of(tl.load(at_slice), PACKED)
                        to_n = tl.load(at_slice + 2)
                    if (block_n * BLOCK_N < to_n) & (block_n * BLOCK_N + BLOCK_N > from_n):
                        delta = _expand_many(
                            delta, z_row + tl.load(at_slice + 1) * PAGE, position, block_from, block_to,
                            slice * adapters, n - from_n, to_n - from_n,
                            ids, starts, owners, blocks, pages, rows, scaling, biases, M,
                            DTYPE, PACKED, BACKWARD, BY_ROW, IEEE, FIELD, BLOCK_M,
                        )  # fmt: skip
            else:
                delta = _expand_many(
                    delta, z_row, position, block_from, block_to, 0, n, N,
                    ids, starts, owners, blocks, pages, rows, scaling, biases, M,
                    DTYPE, PACKED, BACKWARD, BY_ROW, IEEE, FIELD, BLOCK_M,
                )  # fmt: skip
        else:
            for page in tl.range(0, tl.cdiv(one_rank, PAGE), num_stages=1):
                r = page * PAGE + tl.arange(0, PAGE)
                mask = (position < M)[:, None] & (r < one_rank)[None, :]
                v = _load_v(z_row[:, None] + r[None, :], mask, one_code, BACKWARD)
                address = one_up + page * PAGE * one_up_r * (DTYPE.primitive_bitwidth // 8)
                up_tile = _load_up(address, one_up_n, one_up_r, one_rank - page * PAGE, n, N, DTYPE, False)
                delta = _dot_v(v * one_scaling, up_tile, delta, IEEE, FIELD)
            if not BACKWARD:
                columns = tl.where(one_bias != 0, N, 0)
                beta = one_bias.to(tl.int64).to(tl.pointer_type(DTYPE))
                delta += tl.sum(_load_columns(beta, n, columns), axis=0)[None, :]
        if OWN_SUMS:
            kept = keep_mask(seed, row, block_n * BLOCK_N, N, threshold, QUADS, BLOCK_N)
            acc += tl.where(kept, delta * keep_scale, 0.0)
        else:
            acc = delta
        # the bias comes after the products, so that on Blackwell the sums leave tensor memory only once
        if bias is not None:
            acc += tl.sum(_load_columns(bias, n, N), axis=0)[None, :]
        y_tile = y + row[:, None] * N + n[None, :]
        tl.store(y_tile, round_to(acc, y.dtype.element_ty), mask=(position < M)[:, None] & (n < N)[None, :])


@triton.jit
def _expand_many(
    acc, z_row, position, block_from, block_to, entry, n, N,
    ids, starts, owners, blocks, pages, rows, scaling, biases, M,
    DTYPE: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, BY_ROW: tl.constexpr, IEEE: tl.constexpr,
    FIELD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """acc plus the adapters' terms for all rows of the block. entry: index of adapter 0 in rows, scaling and biases."""
    segment = tl.load(blocks + block_from // 16)
    at = tl.load(starts + segment)
    if BY_ROW:
        # by segment: one dot per page of each segment; by row: one product per rank. A dot costs as much as two ranks
        id = tl.load(ids + position, mask=position < M, other=-1)
        rank = tl.load(rows + (entry + id) * 4 + 1, mask=id >= 0, other=0)
        heads = segment_heads(position, id, ids, BLOCK_M)
        dots = tl.sum(tl.where(heads, tl.maximum(tl.cdiv(rank, PAGE), 1), 0))
        max_rank = tl.max(rank)
        if max_rank < 2 * (dots - 1):
            acc = _expand_by_row(
                acc, z_row, id >= 0, entry + id, rank, max_rank, n, N, pages, rows, scaling, biases,
                DTYPE, PACKED, BACKWARD,
            )  # fmt: skip
            at = block_to  # no segment is left
    while at < block_to:
        i = tl.load(owners + segment)
        segment += 1
        end = tl.load(starts + segment)
        if i >= 0:
            row = rows + (entry + i) * 4
            own = (position >= at) & (position < end)
            acc = _expand_segment(
                acc, z_row, own, n, N, pages + tl.load(row) * 5, tl.load(row + 1), tl.load(row + 2),
                tl.load(scaling + entry + i), tl.load(biases + (entry + i) * 2 + 1), DTYPE, PACKED, BACKWARD, IEEE,
                FIELD,
            )  # fmt: skip
        at = end
    return acc


@triton.jit
def _expand_segment(
    acc, z_row, own, n, N, pages, rank, code, s, beta,
    DTYPE: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, IEEE: tl.constexpr, FIELD: tl.constexpr,
):  # fmt: skip
    """acc + s · act(z) Bᵀ + β of one adapter, for the rows that use it.

    All other rows enter the dots as v = 0, which adds nothing to them as long as B is finite. So inf and NaN in B are
    replaced by 0 in the dots, and their columns become NaN in the adapter's own rows. (A second tile of sums to select
    from would keep inf apart from NaN, but would cost its registers.)
    """
    columns = _load_columns(beta.to(tl.pointer_type(DTYPE)), n, tl.where(beta != 0 and not BACKWARD, N, 0))
    for page in tl.range(0, tl.cdiv(rank, PAGE), num_stages=1):
        entry = pages + page * 5
        r = page * PAGE + tl.arange(0, PAGE)
        up_n, up_r = 1, 0
        if BACKWARD:
            up_r = tl.load(entry + 1)
        else:
            up_n = tl.load(entry + 3)
            up_r = tl.load(entry + 4)
        up = _load_up(tl.load(entry + (0 if BACKWARD else 2)), up_n, up_r, rank - page * PAGE, n, N, DTYPE, PACKED)
        finite = tl.abs(up.to(tl.float32)) < float("inf")
        columns += tl.where(finite, 0.0, float("nan"))
        v = _load_v(z_row[:, None] + r[None, :], own[:, None] & (r < rank)[None, :], code, BACKWARD)
        acc = _dot_v(v * s, tl.where(finite, up, 0.0), acc, IEEE, FIELD)
    return tl.where(own[:, None], acc + tl.sum(columns, axis=0)[None, :], acc)


@triton.jit
def _expand_by_row(
    acc, z_row, has_adapter, entry, rank, max_rank, n, N, pages, rows, scaling, biases,
    DTYPE: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """acc + s · act(z) Bᵀ + β where each row reads its own adapter, without dots: BLOCK_N products per row and rank."""
    columns = n < N
    if PACKED > 0:
        columns &= n >= 0
    first = tl.load(rows + entry * 4, mask=has_adapter, other=0)
    s = tl.load(scaling + entry, mask=has_adapter, other=0.0)
    for page in tl.range(0, tl.cdiv(max_rank, PAGE), num_stages=1):
        on_page = rank > page * PAGE
        of_page = pages + (first + page) * 5
        if BACKWARD:
            up_row = tl.load(of_page, mask=on_page, other=0).to(tl.pointer_type(DTYPE))
            up_n = 1
            up_r = tl.load(of_page + 1, mask=on_page, other=0)
        else:
            up_row = tl.load(of_page + 2, mask=on_page, other=0).to(tl.pointer_type(DTYPE))
            up_n = tl.load(of_page + 3, mask=on_page, other=0)[:, None]
            up_r = tl.load(of_page + 4, mask=on_page, other=0)
        for lane in tl.range(0, tl.minimum(max_rank - page * PAGE, PAGE), num_stages=1):
            own = page * PAGE + lane < rank
            v = tl.load(z_row + page * PAGE + lane, mask=own, other=0.0)
            if not BACKWARD:
                v = activate(v, tl.load(rows + entry * 4 + 2, mask=has_adapter, other=0))
            pointer = (up_row + lane * up_r)[:, None] + n[None, :].to(tl.int64) * up_n
            up_rank = tl.load(pointer, mask=own[:, None] & columns[None, :], other=0.0)
            acc += (v * s)[:, None] * up_rank.to(tl.float32)
    if not BACKWARD:
        beta = tl.load(biases + entry * 2 + 1, mask=has_adapter, other=0)
        pointer = beta.to(tl.pointer_type(DTYPE))[:, None] + n[None, :]
        acc += tl.load(pointer, mask=(beta != 0)[:, None] & columns[None, :], other=0.0).to(tl.float32)
    return acc


@triton.jit
def _dot_v(v, up, acc, IEEE: tl.constexpr, FIELD: tl.constexpr):
    """acc + v·up with the same kind of products as acc, in fp32 or by bf16 terms: 3 of v, 1 to 3 of up.

    Terms are rounded to nearest, so each is at most 2⁻⁸ of the one before. Of the pairs i, j those with i + j > 2 are
    left out, together less than 2⁻²³ |v||up|: 3 products beside bf16, 5 beside fp16, 6 beside fp32.

    FIELD: one product, with v and up rounded to that dtype.

    The loops are not unrolled. Every product in the code has its own accumulators in Blackwell's tensor memory, which
    has room for two tiles of 128 · 256; and terms that wait for their turn would take registers from the sums.
    """
    if IEEE:
        acc = dot(v, up.to(tl.float32), acc)
    elif FIELD is not None:
        acc = dot(round_to(v, FIELD), to_field(up, FIELD), acc)
    elif up.dtype == tl.bfloat16:
        acc = _dot_v_terms(v, up, 3, acc)
    else:
        rest = up.to(tl.float32)
        for number in tl.range(0, 3 if up.dtype == tl.float32 else 2, num_stages=1):
            term = nearest_term(rest)
            acc = _dot_v_terms(v, term.to(tl.bfloat16), 3 - number, acc)
            rest = remainder(rest, term)
    return acc


@triton.jit
def _dot_v_terms(v, up_term, count, acc):
    """acc + the first `count` terms of v · up_term."""
    rest = v
    for _ in tl.range(0, count, num_stages=1):
        term = nearest_term(rest)
        acc = dot(term.to(tl.bfloat16), up_term, acc)
        rest = remainder(rest, term)
    return acc


@triton.jit
def _load_v(pointer, mask, code, BACKWARD: tl.constexpr):
    """v: act(z) in fp32 in the forward, u unchanged in the backward; 0 where masked. code: the adapter's activation."""
    v = tl.load(pointer, mask=mask, other=0.0)
    if not BACKWARD:
        if code > 0:
            v = activate(v, code)
    return v


@triton.jit
def _load_up(address, stride_n, stride_r, ranks, n, N, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """One page of Bᵀ (backward: of A), [PAGE, BLOCK_N], 0 beyond its ranks and columns."""
    lane = tl.arange(0, PAGE)
    columns = n < N
    if PACKED > 0:
        columns &= n >= 0
    # an address passed as an argument arrives as int32 when it is small
    pointer = address.to(tl.int64).to(tl.pointer_type(DTYPE)) + lane[:, None].to(tl.int64) * stride_r
    return tl.load(
        pointer + n[None, :].to(tl.int64) * stride_n, mask=(lane < ranks)[:, None] & columns[None, :], other=0.0
    )


@triton.jit
def _load_columns(pointer, n, columns):
    """fp32 [PAGE, BLOCK_N] whose sum over rows is the value of each column: 0 for columns outside 0 … columns - 1.

    The values are in the first row; the other rows are 0, so the tile has the shape of a page of B. A plain load would
    use the accumulators' layout, where each thread holds every fourth column and needs two registers per address.
    """
    lane = tl.arange(0, PAGE)
    mask = (lane == 0)[:, None] & ((n >= 0) & (n < columns))[None, :]
    return tl.load(pointer + lane[:, None] * 0 + n[None, :], mask=mask, other=0.0).to(tl.float32)
