"""The rows of a batch sorted by adapter: the tensors that describe them. `docs/segments.md`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST_ADAPTERS = 2**20  # a key of the kernels, (id + 1) · 1024 + row, fits in int32


class Segments(NamedTuple):
    """The rows of a batch sorted by adapter. Depends only on the ids, so all layers of a forward share one."""

    order: Tensor  # int64 [M]: the original row at each sorted place; rows of one adapter keep their order
    ids: Tensor  # int32 [M]: the adapter at each sorted place, ascending; -1: base layer only
    ends: Tensor  # int32 [1 + adapters]: the place after the last row of -1, of adapter 0, of adapter 1, …
    starts: Tensor  # int32 [S + 1], S = min(M, adapters + 1): where each non-empty segment starts, in order; then M
    owners: Tensor  # int32 [S + 1]: the adapter of each of these segments (-1 possible only first); then -1
    blocks: Tensor  # int32 [⌈M / 16⌉]: which of these segments holds place 16 · b


def empty(M: int, adapters: int, device: torch.device) -> Segments:
    """Uninitialised segments of M rows. Raises ValueError for more than MOST_ADAPTERS adapters."""
    if adapters > MOST_ADAPTERS:
        raise ValueError(f"adapters: expected at most {MOST_ADAPTERS}, got {adapters}")
    S = min(M, adapters + 1)
    order = torch.empty(M, dtype=torch.int64, device=device)
    sizes = (M, adapters + 1, S + 1, S + 1, -(-M // 16))
    return Segments(order, *(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))
