"""The tokens of a batch in the order of their adapters, computed on the device without a host synchronisation."""

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Depends on the ids only: one of these serves every layer of a model's forward."""

    order: Tensor  # int64 [M]: the original row at each sorted place; rows of one adapter keep their order
    ids: Tensor  # int32 [M]: the adapter at each sorted place, ascending; -1 = base layer only
    ends: Tensor  # int32 [1 + adapters]: the place after the last row of -1, of adapter 0, of adapter 1, …


def segments(ids: Tensor, adapters: int) -> Segments:
    """Sorts ids (any integer type, [M]). An id outside 0 … adapters - 1 counts as -1."""
    outside = (ids < 0) | (ids >= adapters)
    sorted_ids, order = torch.sort(ids.to(torch.int32).masked_fill(outside, -1), stable=True)
    every = torch.arange(-1, adapters, dtype=torch.int32, device=ids.device)
    return Segments(order, sorted_ids, torch.searchsorted(sorted_ids, every, right=True, out_int32=True))
