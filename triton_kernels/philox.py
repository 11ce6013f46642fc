"""Dropout masks with exactly the bits of `peftk.reference.philox`."""

import functools

import triton
import triton.language as tl

from peftk.reference import philox


@functools.lru_cache(maxsize=64)
def arguments(dropout_p: float) -> tuple[int, float]:
    """A kernel's arguments threshold (a uint32 passed as an int32) and keep_scale = 1 / (1 - p)."""
    threshold = philox.threshold(dropout_p)
    return threshold - 2**32 if threshold >= 2**31 else threshold, 1.0 / (1.0 - dropout_p)


@triton.jit
def keep_mask(seed, row, k_start, K, threshold, QUADS: tl.constexpr, WIDTH: tl.constexpr):
    """bool [rows, WIDTH] for columns k_start … k_start + WIDTH - 1 of the int64 rows; k_start is a multiple of 4.

    Element e = row · K + k takes word e % 4 of Philox block e // 4. Where K is a multiple of 4 (QUADS), a block belongs
    to four neighbours of one row and is computed once for all four; otherwise each element computes its own.
    """
    if QUADS:
        block = (row * (K // 4))[:, None] + (k_start // 4 + tl.arange(0, WIDTH // 4))[None, :]
        w0, w1, w2, w3 = _philox_words(seed, block)
        word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (row.shape[0], WIDTH))
    else:
        element = (row * K)[:, None] + (k_start + tl.arange(0, WIDTH))[None, :]
        w0, w1, w2, w3 = _philox_words(seed, element >> 2)
        lane = element & 3
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def _philox_words(seed, block):
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    none = tl.zeros_like(low)
    return tl.philox(tl.load(seed), low, high, none, none)
