"""The kernels of merge: a program owns one tile of W of one layer. `peftk.reference.merge` is their specification.

A layer is a row of a table in device memory. No rank, shape, stride, address or number of layers is a compile-time
constant. Sums across programs are integers, so the result does not depend on the order of the programs.
"""

import triton
import triton.language as tl

from peftk.launch.merge_layers import FIELDS
from peftk.reference.merge import RAW, ZERO

from .arithmetic import fma, round_to, widen

CODE_RAW = tl.constexpr(RAW)
CODE_ZERO = tl.constexpr(ZERO)

# The columns of the table.
WIDTH = tl.constexpr(len(FIELDS))
WEIGHT, STRIDE, HEIGHT, COLUMNS, CODE, LORA_A, LORA_B, RANKS, FIRST_ADAPTER, END_ADAPTER, ACROSS = (
    tl.constexpr(column) for column in range(11)
)
FIRST_TILE, FIRST_ROW, FIRST_WEIGHT, IS_ALIGNED = (tl.constexpr(column) for column in range(11, 15))

RANKS_AT_ONCE = tl.constexpr(2)  # ranks whose loads are in flight together


@triton.jit(do_not_specialize=["layers", "room"])
def merge_kernel(
    table, ends, scaling, merged, row_sums, refused, raw_count, raw_keys, raw_values, layers: tl.int32, room: tl.int32,
    DTYPE: tl.constexpr, ADAPTER_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Merges a tile in place, unless it is merged already.

    It is left unmerged if W' would not be finite (`refused`), or if its raw weights do not fit into `room`; `raw_count`
    then says how much room all of them need.
    """
    tile = tl.program_id(0)
    if tl.load(merged + tile) == 0:
        layer = layer_of(tile, table + FIRST_TILE, layers)
        if tl.load(table + layer * WIDTH + IS_ALIGNED) != 0:
            _merge_tile(
                tile, layer, table, ends, scaling, merged, row_sums, refused, raw_count, raw_keys, raw_values, room,
                DTYPE, ADAPTER_DTYPE, True, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _merge_tile(
                tile, layer, table, ends, scaling, merged, row_sums, refused, raw_count, raw_keys, raw_values, room,
                DTYPE, ADAPTER_DTYPE, False, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _merge_tile(
    tile, layer, table, ends, scaling, merged, row_sums, refused, raw_count, raw_keys, raw_values, room,
    DTYPE: tl.constexpr, ADAPTER_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = table + layer * WIDTH
    n, k, inside, w_at, code_at = _tile_elements(tile, row, DTYPE, ALIGNED, BLOCK_N, BLOCK_K)
    d = _delta(tile, row, ends, scaling, ADAPTER_DTYPE, ALIGNED, BLOCK_N, BLOCK_K)
    w = tl.load(w_at, mask=inside, other=0.0)
    new = round_to(widen(w) + d, DTYPE)
    back = round_to(widen(new) - d, DTYPE)
    code = _encode(_bits(w), _bits(back), DTYPE)
    raw = inside & (code == CODE_RAW)
    infinite = inside & (_magnitude(_bits(new), DTYPE) >= _infinity(DTYPE))
    worst = tl.max(tl.where(infinite, 2, raw.to(tl.int32)))
    written = worst < 2
    if worst == 2:
        tl.store(refused + layer, 1)
    elif worst == 1:
        slot = tl.atomic_add(raw_count + tl.zeros_like(code), 1, mask=raw, sem="relaxed")
        written = tl.max(tl.where(raw, slot, 0)) < room
        key = tl.load(row + FIRST_WEIGHT) + n * tl.load(row + COLUMNS) + k
        # (not `raw & written`: Triton 3.9's interpreter cannot combine a vector and a scalar in a mask)
        kept = raw & (slot < tl.where(written, room, 0))
        tl.store(raw_keys + slot, key, mask=kept)
        tl.store(raw_values + slot, w, mask=kept)
    if written:
        tl.store(w_at, new, mask=inside)
        tl.store(code_at, code.to(tl.int8), mask=inside)
        _add_row_sums(row_sums, row, _bits(new), n, k, inside, DTYPE)
        tl.store(merged + tile, 1)


@triton.jit(do_not_specialize=["layers"])
def unmerge_kernel(
    table, ends, scaling, merged, layers: tl.int32,
    DTYPE: tl.constexpr, ADAPTER_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Unmerges a tile in place, if it is merged. Raw weights become W″ until `restore_kernel` puts them back."""
    tile = tl.program_id(0)
    if tl.load(merged + tile) != 0:
        row = table + layer_of(tile, table + FIRST_TILE, layers) * WIDTH
        if tl.load(row + IS_ALIGNED) != 0:
            _unmerge_tile(tile, row, ends, scaling, DTYPE, ADAPTER_DTYPE, True, BLOCK_N, BLOCK_K)
        else:
            _unmerge_tile(tile, row, ends, scaling, DTYPE, ADAPTER_DTYPE, False, BLOCK_N, BLOCK_K)


@triton.jit
def _unmerge_tile(
    tile, row, ends, scaling,
    DTYPE: tl.constexpr, ADAPTER_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _, _, inside, w_at, code_at = _tile_elements(tile, row, DTYPE, ALIGNED, BLOCK_N, BLOCK_K)
    d = _delta(tile, row, ends, scaling, ADAPTER_DTYPE, ALIGNED, BLOCK_N, BLOCK_K)
    w = tl.load(w_at, mask=inside, other=0.0)
    code = tl.load(code_at, mask=inside, other=0)
    back = round_to(widen(w) - d, DTYPE)
    tl.store(w_at, _from_bits(_decode(_bits(back), code.to(tl.int32), DTYPE), DTYPE), mask=inside)


@triton.jit(do_not_specialize=["layers", "count"])
def restore_kernel(
    table, raw_keys, raw_values, layers: tl.int32, count: tl.int64, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes raw weights back to W. A key is an index into the weights of all layers in order; -1 is no weight."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(raw_keys + at, mask=at < count, other=-1)
    row = table + layer_of(key, table + FIRST_WEIGHT, layers) * WIDTH
    K = tl.load(row + COLUMNS)
    within = key - tl.load(row + FIRST_WEIGHT)
    place = within // K * tl.load(row + STRIDE) + within % K
    value = tl.load(raw_values + at, mask=key >= 0, other=0.0)
    tl.store(tl.load(row + WEIGHT).to(tl.pointer_type(DTYPE)) + place, value, mask=key >= 0)


@triton.jit(do_not_specialize=["layers"])
def checksum_kernel(
    table, row_sums, layers: tl.int32, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Adds a tile's share to the row sums of the checksum."""
    tile = tl.program_id(0)
    row = table + layer_of(tile, table + FIRST_TILE, layers) * WIDTH
    if tl.load(row + IS_ALIGNED) != 0:
        _checksum_tile(tile, row, row_sums, DTYPE, True, BLOCK_N, BLOCK_K)
    else:
        _checksum_tile(tile, row, row_sums, DTYPE, False, BLOCK_N, BLOCK_K)


@triton.jit
def _checksum_tile(
    tile, row, row_sums, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n, k, inside, w_at, _ = _tile_elements(tile, row, DTYPE, ALIGNED, BLOCK_N, BLOCK_K)
    w = tl.load(w_at, mask=inside, other=0.0)
    _add_row_sums(row_sums, row, _bits(w), n, k, inside, DTYPE)


@triton.jit
def layer_of(item, firsts, layers):
    """The layer of a tile or weight (a scalar or a block of them), by bisection of the table's column `firsts`."""
    low = item.to(tl.int32) * 0
    high = low + layers
    span = layers
    while span > 1:
        middle = (low + high) // 2
        beyond = tl.load(firsts + middle * WIDTH) > item
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, middle)
        span = (span + 1) // 2
    return low


@triton.jit
def _tile_elements(tile, row, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile's rows and columns, which of its elements exist, and their addresses in W and in the code.

    ALIGNED: the tile is [BLOCK_N, BLOCK_K], and a thread has 16 neighbouring bytes of W. The compiler cannot see the
    alignment of values loaded from the table, so it is stated here. Otherwise the tile has the layout of `_delta`:
    single accesses by 16 neighbouring threads, with few addresses.
    """
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth if ALIGNED else 1
    first_n, first_k = _tile_origin(tile, row, BLOCK_N, BLOCK_K)
    K = tl.multiple_of(tl.load(row + COLUMNS), VECTOR)
    stride = tl.multiple_of(tl.load(row + STRIDE), VECTOR)
    w_at = tl.multiple_of(tl.load(row + WEIGHT).to(tl.pointer_type(DTYPE)), 16 if ALIGNED else 1)
    code_at = tl.multiple_of(tl.load(row + CODE).to(tl.pointer_type(tl.int8)), VECTOR)
    w_at += first_n * stride + first_k
    code_at += first_n * K + first_k
    if ALIGNED:
        n = tl.arange(0, BLOCK_N)[:, None]
        k = tl.arange(0, BLOCK_K)[None, :]
        w_at = w_at + n * stride + k
        code_at = code_at + n * K + k
    else:
        n, k = _spread_indices(BLOCK_N, BLOCK_K)
        w_at = w_at + n * stride + k
        code_at = code_at + n * K + k
    n += first_n
    k += first_k
    return n, k, (n < tl.load(row + HEIGHT).to(tl.int32)) & (k < K.to(tl.int32)), w_at, code_at


@triton.jit
def _tile_origin(tile, row, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    across = tl.load(row + ACROSS).to(tl.int32)
    index = tile - tl.load(row + FIRST_TILE).to(tl.int32)
    return index // across * BLOCK_N, index % across * BLOCK_K


@triton.jit
def _spread_indices(BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Row and column indices of a tile as [down, across, 16, 16]: 16 · 16 threads with down · across elements each."""
    n = tl.arange(0, BLOCK_N // 16)[:, None, None, None] * 16 + tl.arange(0, 16)[None, None, :, None]
    k = tl.arange(0, BLOCK_K // 16)[None, :, None, None] * 16 + tl.arange(0, 16)[None, None, None, :]
    return n, k


@triton.jit
def _delta(
    tile, row, ends, scaling, ADAPTER_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d = Σ scaling · chain over the layer's adapters, in order, in the tile's shape. A chain is one fma per rank.

    A chain is not padded with zeros, since fma(0, 0, -0) is +0: the ranks that are left over are added one by one. d
    starts at -0, since -0 + t = t for every t of either sign.
    """
    first_n, first_k = _tile_origin(tile, row, BLOCK_N, BLOCK_K)
    n, k = _spread_indices(BLOCK_N, BLOCK_K)
    K = tl.load(row + COLUMNS)
    R = tl.load(row + RANKS)
    k_exists = k < K.to(tl.int32) - first_k
    n_exists = n < tl.load(row + HEIGHT).to(tl.int32) - first_n
    A = tl.load(row + LORA_A).to(tl.pointer_type(ADAPTER_DTYPE)) + first_k
    B_at = tl.load(row + LORA_B).to(tl.pointer_type(ADAPTER_DTYPE)) + first_n * R + n * R
    zero = tl.zeros((BLOCK_N // 16, BLOCK_K // 16, 16, 16), tl.float32)
    d = tl.broadcast_to(_minus_zero(), (BLOCK_N // 16, BLOCK_K // 16, 16, 16))
    rank = 0
    for adapter in tl.range(tl.load(row + FIRST_ADAPTER).to(tl.int32), tl.load(row + END_ADAPTER).to(tl.int32)):
        end = tl.load(ends + adapter)
        whole = rank + (end - rank) // RANKS_AT_ONCE * RANKS_AT_ONCE
        t = zero
        for start in tl.range(rank, whole, RANKS_AT_ONCE, num_stages=1):
            for r in tl.static_range(RANKS_AT_ONCE):
                t = _add_rank(t, A + (start + r) * K + k, B_at + start + r, k_exists, n_exists)
        for start in tl.range(whole, end, num_stages=1):
            t = _add_rank(t, A + start * K + k, B_at + start, k_exists, n_exists)
        d += tl.load(scaling + adapter) * t
        rank = end
    return tl.reshape(tl.permute(d, (0, 2, 1, 3)), (BLOCK_N, BLOCK_K)) if ALIGNED else d


@triton.jit
def _add_rank(t, A_at, B_at, k_exists, n_exists):
    a = tl.load(A_at, mask=k_exists, other=0.0)
    b = tl.load(B_at, mask=n_exists, other=0.0)
    return fma(widen(b), widen(a), t)


@triton.jit
def _minus_zero():
    """fp32 -0. A literal -0.0 would arrive as +0."""
    return tl.full((), -2147483648, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _add_row_sums(row_sums, row, bits, n, k, inside, DTYPE: tl.constexpr):
    """Adds Σ_k (2k + 1) · bits modulo 2³² to each row's sum. 16-bit values have signed 16-bit multipliers."""
    odd = 2 * k + 1
    if DTYPE.primitive_bitwidth == 16:
        odd = odd.to(tl.int16).to(tl.int32)
    shares = tl.where(inside, odd * bits, 0)
    if len(n.shape) == 4:
        sums = tl.sum(tl.sum(shares, axis=3, keep_dims=True), axis=1, keep_dims=True)
    else:
        sums = tl.sum(shares, axis=1, keep_dims=True)
    tl.atomic_add(row_sums + tl.load(row + FIRST_ROW) + n, sums, mask=n < tl.load(row + HEIGHT), sem="relaxed")


@triton.jit
def _bits(x):
    """The bits of x as int32, sign-extended."""
    return x.to(tl.int16 if x.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True).to(tl.int32)


@triton.jit
def _from_bits(bits, DTYPE: tl.constexpr):
    return bits.to(tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32).to(DTYPE, bitcast=True)


@triton.jit
def _magnitude(bits, DTYPE: tl.constexpr):
    return bits & (0x7FFF if DTYPE.primitive_bitwidth == 16 else 0x7FFFFFFF)


@triton.jit
def _infinity(DTYPE: tl.constexpr):
    if DTYPE.primitive_bitwidth == 32:
        return 0x7F800000
    else:
        return 0x7F80 if DTYPE.is_bf16() else 0x7C00


@triton.jit
def _sign_magnitude_order(bits, DTYPE: tl.constexpr):
    """The rank of a value in sign-magnitude order: +0 is 0, -0 is -1. Its own inverse."""
    return bits ^ _magnitude(bits >> 31, DTYPE)


@triton.jit
def _encode(bits, back, DTYPE: tl.constexpr):
    order = _sign_magnitude_order(bits, DTYPE)
    distance = order - _sign_magnitude_order(back, DTYPE)
    code = tl.where((distance > CODE_ZERO) & (distance < CODE_RAW), distance, CODE_RAW)
    return tl.where(order == 0, CODE_ZERO, code)


@triton.jit
def _decode(back, code, DTYPE: tl.constexpr):
    order = _sign_magnitude_order(back, DTYPE) + tl.where(code == CODE_RAW, 0, code)
    return _sign_magnitude_order(tl.where(code == CODE_ZERO, 0, order), DTYPE)
