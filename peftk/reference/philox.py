"""Dropout masks from the counter-based generator Philox4x32-10 (Salmon et al., SC 2011): the same on every backend.

Element (row m, column k) of x [M, K] has the index e = m·K + k. The counter is (e // 4 as two 32-bit words, 0, 0), the
key is the seed as two 32-bit words, and the element uses word e % 4 of the block. It is dropped if that word is below
⌊p · 2³²⌋. The mask depends only on the index, so it does not depend on the order in which rows are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def threshold(p: float) -> int:
    """⌊p · 2³²⌋: a word below it drops its element."""
    return int(p * 2.0**32)


def keep_mask(rows: int, columns: int, p: float, seed: Tensor) -> Tensor:
    """bool [rows, columns], True for elements that are kept, each with probability 1 - p. seed: int64 [1]."""
    device = seed.device
    blocks = torch.arange(-(-rows * columns // 4), dtype=torch.int64, device=device)
    words = _philox(blocks, seed.reshape(()))
    flat = torch.stack(words, dim=1).reshape(-1)[: rows * columns]
    return (flat >= threshold(p)).reshape(rows, columns)


def keep_mask_of_columns(rows: int, columns: int, first: int, last: int, p: float, seed: Tensor) -> Tensor:
    """The columns [first, last) of `keep_mask(rows, columns, p, seed)`, without computing the others."""
    row = torch.arange(rows, dtype=torch.int64, device=seed.device)[:, None]
    element = row * columns + torch.arange(first, last, dtype=torch.int64, device=seed.device)
    block, words = element // 4, -(-(last - first) // 4) + 1
    begin = block[:, :1]
    blocks = begin + torch.arange(words, dtype=torch.int64, device=seed.device)
    drawn = torch.stack(_philox(blocks.reshape(-1), seed.reshape(())), dim=1).reshape(rows, 4 * words)
    return drawn.gather(1, element - 4 * begin) >= threshold(p)


def _philox(blocks: Tensor, seed: Tensor) -> list[Tensor]:
    c = [blocks & _MASK, (blocks >> 32) & _MASK, torch.zeros_like(blocks), torch.zeros_like(blocks)]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # 32 x 32 -> 64 bits: the product wraps in int64, but its two halves are correct after masking
        p0, p1 = c[0] * _M0, c[2] * _M1
        high0, high1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        c = [(high1 ^ c[1] ^ k0) & _MASK, p1 & _MASK, (high0 ^ c[3] ^ k1) & _MASK, p0 & _MASK]
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c
