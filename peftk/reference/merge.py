"""The specification of merge and unmerge, in plain torch: the same bits as every kernel.

    t ← +0;  for k = 0 … R-1:  t ← fma(B[n, k], A[k, j], t)          fp32, ascending rank, one rounding a step
    d = fl(s · t);   W' = round(fl(W + d))                           round: to W's dtype, to nearest even
    unmerge:         W″ = round(fl(W' - d)),  then the code brings W back from W″

The code is one byte a weight: the distance from W″ to W, counted in representable values of W's dtype in
sign-magnitude order (so -0 and +0 are neighbours, not equal). Two codes are special: `RAW` where the distance does not
fit (the caller keeps those weights aside), `ZERO` where W was +0 (pruned weights, which would all be RAW otherwise).

fp64 weights are computed in fp64 with a rounded product in place of the fma; only the reference serves them.
"""

from __future__ import annotations

import torch
from torch import Tensor

RAW = 127
ZERO = -128


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns W' [N, K] in W's dtype and the code int8 [N, K]. W is left alone; nothing is checked for being finite."""
    delta = _delta(weight, lora_A, lora_B, scaling)
    merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
    return merged, _encode(weight, _subtract(merged, delta))


def unmerge(merged: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, code: Tensor) -> Tensor:
    """Returns W [N, K] from W' and the code; where the code is RAW the value is W″, to be replaced by the caller."""
    return _decode(_subtract(merged, _delta(merged, lora_A, lora_B, scaling)), code)


def inspect(weight: Tensor) -> tuple[int, bool]:
    """A checksum of the bits of W [N, K], and whether every value is finite.

        Σ_n ((n · 0x9E3779B97F4A7C15) | 1) · Σ_j ((j · 0x9E3779B1 mod 2³²) | 1) · bits[n, j]        modulo 2⁶⁴

    The multipliers are odd, so a change of one element always shows, and rows or columns that change places show too.
    fp64 counts as twice as many columns of 32 bits.
    """
    bits = weight.detach().contiguous()
    bits = bits.view(torch.int16 if weight.element_size() == 2 else torch.int32)
    unsigned = 2 ** (8 * bits.element_size()) - 1
    places = ((torch.arange(bits.shape[1], device=bits.device) * 0x9E3779B1) & 0xFFFFFFFF) | 1
    total = 0
    for first in range(0, bits.shape[0], _INSPECT_ROWS):  # in pieces: the products take 8 bytes each
        rows = ((bits[first : first + _INSPECT_ROWS].to(torch.int64) & unsigned) * places).sum(1)
        for n, row in enumerate(rows.tolist(), start=first):
            total += row * ((n * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) | 1)
    return total & 0xFFFFFFFFFFFFFFFF, bool(torch.isfinite(weight).all())


_INSPECT_ROWS = 512


def _subtract(merged: Tensor, delta: Tensor) -> Tensor:
    return (merged.to(delta.dtype) - delta).to(merged.dtype)


def _delta(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """d [N, K], fp32 (fp64 for fp64 weights)."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    A, B = lora_A.to(torch.float64), lora_B.to(torch.float64)
    t = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    for k in range(A.shape[0]):
        product = B[:, k, None] * A[k]  # exact in fp64: 24 + 24 bits
        t = t + product if wide == torch.float64 else _round_sum(t.to(torch.float64), product)
    return t * torch.tensor(scaling, dtype=wide, device=weight.device)


def _round_sum(a: Tensor, b: Tensor) -> Tensor:
    """fl32(a + b) of two fp64 tensors, rounded once.

    The fp64 sum is first rounded to odd: where two-sum says that it was inexact and its last bit is even, the other
    neighbour is taken. Rounding that to fp32 equals rounding the exact sum (Boldo and Melquiond 2008; 53 ≥ 24 + 2).
    """
    total = a + b
    bb = total - a
    error = (a - (total - bb)) + (b - bb)
    bits = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    move = (error != 0) & total.isfinite() & (bits & 1 == 0)
    return torch.where(move, bits + step, bits).view(torch.float64).to(torch.float32)


_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def _order(values: Tensor) -> Tensor:
    """int64: the place of each value in sign-magnitude order; +0 is 0, -0 is -1. One to one on all bit patterns."""
    bits = values.contiguous().view(_BITS[values.dtype])
    magnitude = (bits & torch.iinfo(bits.dtype).max).to(torch.int64)
    return torch.where(bits < 0, -magnitude - 1, magnitude)


def _from_order(order: Tensor, dtype: torch.dtype) -> Tensor:
    integer = _BITS[dtype]
    magnitude = torch.where(order < 0, -(order + 1), order).to(integer)
    bits = torch.where(order < 0, magnitude | torch.iinfo(integer).min, magnitude)
    return bits.view(dtype)


def _encode(weight: Tensor, back: Tensor) -> Tensor:
    order = _order(weight)
    distance = order - _order(back)
    fits = (distance > ZERO) & (distance < RAW)
    code = torch.where(fits, distance, RAW)
    return torch.where(order == 0, ZERO, code).to(torch.int8)


def _decode(back: Tensor, code: Tensor) -> Tensor:
    distance = torch.where(code == RAW, 0, code.to(torch.int64))
    order = torch.where(code == ZERO, 0, _order(back) + distance)
    return _from_order(order, back.dtype)
