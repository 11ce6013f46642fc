"""Series adapters by Triton in the interpreter."""

from __future__ import annotations

import pytest

from tests.adapter_block import check


@pytest.mark.parametrize("seed", [*range(9), *(pytest.param(s, marks=pytest.mark.full) for s in range(9, 80))])
def test_random(seed: int) -> None:
    check(seed, "triton")
