"""Series adapters by Triton in the interpreter."""

from __future__ import annotations

import pytest

from tests.adapter_block import check


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(s, marks=pytest.mark.full) for s in range(4, 80))])
def test_random(seed: int) -> None:
    check(seed, "triton")
