"""Series adapters on the Triton backend in the interpreter."""

from __future__ import annotations

import pytest

from tests.support.adapter_block import check
from tests.support.tiers import spread


@pytest.mark.parametrize("seed", spread(range(80), default=3, full=12))
def test_random(seed: int) -> None:
    check(seed, "triton")
