"""Packs the code of a merge into four bits per weight, in plain torch: the format that every backend uses.

A code is a byte, and nearly always a small number. Its half is four bits: a distance from -7 to 6 as it is, `HALF_ZERO`
for a weight that was +0, and `HALF_FAR` for any other code, a far code, which is stored as a byte in a separate list,
in row-major order. Two columns share a byte, the even one in the low bits; a row of odd length ends in a half 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftk.reference.merge import ZERO

HALF_FAR = 7
HALF_ZERO = -8
_FARTHEST = -7


def pack(code: Tensor) -> tuple[Tensor, Tensor]:
    """code int8 [N, K] → halves uint8 [N, ⌈K/2⌉] and the far codes, int8, in row-major order."""
    near = (code >= _FARTHEST) & (code < HALF_FAR)
    zero = code == ZERO
    half = torch.where(near, code, torch.where(zero, HALF_ZERO, HALF_FAR).to(torch.int8))
    far = code[~(near | zero)]
    half = (torch.nn.functional.pad(half, (0, code.shape[1] % 2)) & 15).view(torch.uint8)
    return half[:, 0::2] | half[:, 1::2] << 4, far


def unpack(halves: Tensor, far: Tensor, K: int) -> Tensor:
    """The inverse of `pack`: code int8 [N, K]. Raises ValueError unless there are as many far codes as `HALF_FAR`s."""
    both = torch.stack((halves & 15, halves >> 4), dim=2)
    half = (both.view(halves.shape[0], -1)[:, :K] ^ 8).view(torch.int8) - 8
    is_far = half == HALF_FAR
    count = int(is_far.sum())
    if count != len(far):
        raise ValueError(f"receipt: expected {count} far codes, as many as its halves refer to, got {len(far)}")
    return torch.where(half == HALF_ZERO, ZERO, half).to(torch.int8).masked_scatter_(is_far, far)
