"""The specification of merge and unmerge, in plain torch: the same bits as every kernel.

    for each adapter, in order:
        t ← +0;  for k = 0 … R-1:  t ← fma(B[n, k], A[k, j], t)      fp32, ascending rank, one rounding per step
        d ← fl(s · t) for the first one,  d ← fl(d + fl(s · t)) for the others
    merge:    W' = round(fl(W + d))                                  round: to W's dtype, to nearest even
    unmerge:  W″ = round(fl(W' - d)),  then the code brings W back from W″

The code is one byte per weight: the distance from W″ to W, counted in representable values of W's dtype in
sign-magnitude order (so -0 and +0 are neighbours, not equal). Two codes are special: `RAW` if the distance does not fit
(the caller stores those weights separately), and `ZERO` if W was +0 (pruned weights, which would otherwise be RAW).

fp64 weights are computed in fp64, with a rounded product and sum instead of the fma. Only the reference runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RAW = 127
ZERO = -128


class Factors(NamedTuple):
    """The adapters of one merge, concatenated: adapter t has the ranks from ends[t - 1] (0 for the first) to ends[t].

    lora_A [R, K] and lora_B [N, R], with R the sum of all ranks: contiguous, of one dtype. scaling: s of each adapter.
    """

    lora_A: Tensor
    lora_B: Tensor
    ends: tuple[int, ...]
    scaling: tuple[float, ...]


def factors(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float]) -> Factors:
    """Copies the adapters into one A and one B. Different dtypes are converted to fp32, which is exact."""
    tensors = [tensor.detach() for tensor in (*lora_A, *lora_B)]
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.float() for tensor in tensors]
    ends, rank = [], 0
    for A in lora_A:
        rank += A.shape[0]
        ends.append(rank)
    A, B = torch.cat(tensors[: len(lora_A)]), torch.cat(tensors[len(lora_A) :], dim=1)
    return Factors(A.contiguous(), B.contiguous(), tuple(ends), tuple(scaling))


def merge(weight: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Returns W' [N, K] in W's dtype and the code int8 [N, K]. Does not change W, and does not check for inf or NaN."""
    delta = _delta(weight, factors)
    merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
    return merged, _encode(weight, _subtract(merged, delta))


def unmerge(merged: Tensor, factors: Factors, code: Tensor) -> Tensor:
    """Returns W [N, K] from W' and the code. Where the code is RAW it returns W″, which the caller must replace."""
    return _decode(_subtract(merged, _delta(merged, factors)), code)


def checksum(weight: Tensor) -> int:
    """A 64-bit checksum of the bits of W [N, K].

        Σ_n ((n · 0x9E3779B97F4A7C15) | 1) · (Σ_j (2j + 1) · bits[n, j]  modulo 2³²)        modulo 2⁶⁴

    16-bit values and their factor 2j + 1 are signed 16-bit integers, so one SIMD instruction multiplies a register of
    them. All factors are odd, so a change of one element always changes the checksum. fp64 counts as twice as many
    columns of 32 bits.
    """
    bits = weight.detach().contiguous()
    bits = bits.view(torch.int16 if weight.element_size() == 2 else torch.int32)
    places = (2 * torch.arange(bits.shape[1], device=bits.device) + 1).to(bits.dtype).to(torch.int64)
    total = 0
    for first in range(0, bits.shape[0], _CHECKSUM_ROWS):  # in blocks: the products take 8 bytes each
        rows = (bits[first : first + _CHECKSUM_ROWS].to(torch.int64) * places).sum(1) & 0xFFFFFFFF
        for n, row in enumerate(rows.tolist(), start=first):
            total += row * ((n * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) | 1)
    return total & 0xFFFFFFFFFFFFFFFF


_CHECKSUM_ROWS = 512


def _subtract(merged: Tensor, delta: Tensor) -> Tensor:
    return (merged.to(delta.dtype) - delta).to(merged.dtype)


def _delta(weight: Tensor, factors: Factors) -> Tensor:
    """d [N, K], fp32 (fp64 for fp64 weights)."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    A, B = factors.lora_A.to(torch.float64), factors.lora_B.to(torch.float64)
    shares, start = [], 0
    for end, scaling in zip(factors.ends, factors.scaling, strict=True):
        t = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        for k in range(start, end):
            product = B[:, k, None] * A[k]  # exact in fp64: 24 + 24 bits
            t = t + product if wide == torch.float64 else _round_sum(t.to(torch.float64), product)
        shares.append(t * torch.tensor(scaling, dtype=wide, device=weight.device))
        start = end
    delta = shares[0]
    for share in shares[1:]:
        delta = delta + share
    return delta


def _round_sum(a: Tensor, b: Tensor) -> Tensor:
    """fl32(a + b) of two fp64 tensors, rounded once.

    The fp64 sum is first rounded to odd: if two-sum shows that it is inexact and its last bit is even, the other
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
    """int64: the position of each value in sign-magnitude order; +0 is 0, -0 is -1. One to one on all bit patterns."""
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
