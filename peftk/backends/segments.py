"""The rows of a batch in the order of their adapters: what it is made of, and who makes it. `docs/segments.md`.

`of` serves the kernels of every backend that walk rows so. It is a choice like any other (`peftk.backends.choose`, op
"segments"), made once for all layers of a route.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftk import backends, route
from peftk.lasting import lasting

MOST_ADAPTERS = 2**20  # a key of the kernels, (id + 1) · 1024 + row, fits in int32


class Segments(NamedTuple):
    """Depends on the ids only: one of these serves every layer of a model's forward."""

    order: Tensor  # int64 [M]: the original row at each sorted place; rows of one adapter keep their order
    ids: Tensor  # int32 [M]: the adapter at each sorted place, ascending; -1 = base layer only
    ends: Tensor  # int32 [1 + adapters]: the place after the last row of -1, of adapter 0, of adapter 1, …
    starts: Tensor  # int32 [S + 1], S = min(M, adapters + 1): where each non-empty segment starts, in order; then M
    owners: Tensor  # int32 [S + 1]: the adapter of each of these segments (-1 possible only first); then -1
    blocks: Tensor  # int32 [⌈M / 16⌉]: which of these segments holds place 16 · b


def empty(M: int, adapters: int, device: torch.device) -> Segments:
    """Memory for the segments of M rows."""
    if adapters > MOST_ADAPTERS:
        raise ValueError(f"adapters: expected at most {MOST_ADAPTERS}, got {adapters}")
    S = min(M, adapters + 1)
    order = torch.empty(M, dtype=torch.int64, device=device)
    sizes = (M, adapters + 1, S + 1, S + 1, -(-M // 16))
    return Segments(order, *(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))


def of(ids: Tensor, adapters: int) -> Segments:
    """The segments of ids (int32 or int64 [M], any stride). An id outside 0 … adapters - 1 counts as -1.

    Sorted once for all layers of a route and their backward; ids that a user passes, in every call.
    """
    return route.once(ids, (adapters, backends.forced()), lambda: _sorted(ids, adapters))


@lasting()
def _sorted(ids: Tensor, adapters: int) -> Segments:
    call = backends.Call("segments", ids.device.type, ids.dtype, ids.dtype, None, ids.shape[0], 1, 1, 0, adapters)
    found: Segments = backends.module(backends.choose(call).backend).segments(ids, adapters)
    return found
