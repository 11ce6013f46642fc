"""Series adapters on the Triton backend in the interpreter."""

from __future__ import annotations

import pytest

from tests.support.adapter_block import check
from tests.support.tiers import spread


@pytest.mark.parametrize("seed", spread(range(80), default=3, full=12))
def test_random(seed: int) -> None:
    check(seed, "triton")


@pytest.mark.parametrize("seed", spread(range(40), default=1, full=14))
def test_few_long_rows(seed: int) -> None:
    """Where a product with W would be cut into splits of K. W = identity has no sum to cut."""
    check(seed, "triton", max_rows=5, min_width=256, max_width=600)
