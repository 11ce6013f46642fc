"""Ids to sort, and a check of the result, for all backends that sort rows."""

from __future__ import annotations

import torch
from torch import Tensor

from peftk.backends import reference
from peftk.launch.segments import Segments

I32, I64 = torch.int32, torch.int64
LEAST, MOST = torch.iinfo(I64).min, torch.iinfo(I64).max
# Some of them are a valid id if truncated to 32 bits.
WILD = torch.tensor([LEAST, MOST, 2**32, 2**32 + 1, -(2**32), 2**31, 2**63 - 2**32 + 1, 1, -1, 0])


def random_ids(M: int, adapters: int, seed: int = 0, dtype: torch.dtype = I32) -> Tensor:
    """Random ids, some of them out of range on either side."""
    return torch.randint(-2, adapters + 2, (M,), generator=torch.Generator().manual_seed(seed), dtype=dtype)


PATTERNS = {
    "base": lambda M, n: torch.full((M,), -1),
    "first": lambda M, n: torch.zeros(M, dtype=I64),
    "last": lambda M, n: torch.full((M,), n - 1),
    "a row each": lambda M, n: torch.arange(M).flip(0) % n,
    "sorted": lambda M, n: torch.arange(M) * (n + 1) // M - 1,
    "runs": lambda M, n: torch.arange(M) // 23 * 7 % n,
    "outside": lambda M, n: torch.tensor([n, -2, n + 1, 2**31 - 1, -(2**31)]).repeat(-(-M // 5))[:M],
    "random": lambda M, n: random_ids(M, n, 1, I64),
}


def check_segments(found: Segments, ids: Tensor, adapters: int) -> Segments:
    """Raises AssertionError unless found equals the specification exactly; returns it."""
    for name, tensor, expected in zip(found._fields, found, reference.segments(ids, adapters), strict=True):
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor.cpu(), expected), f"{name}: expected {expected}, got {tensor}"
    return found
