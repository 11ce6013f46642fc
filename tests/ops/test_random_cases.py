"""A thousand random cases on every CPU backend, within the error bounds; a default run takes a third of them."""

from __future__ import annotations

import pytest
import torch

from tests.support import numerics
from tests.support.cases import expected, random_case, run
from tests.support.tiers import spread

CHUNK = 50


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("chunk", spread(range(1000 // CHUNK), default=5))
def test_random_cases(backend: str, chunk: int) -> None:
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        case = random_case(seed)
        y = run(case, backend)
        assert y.dtype == case.x.dtype
        try:
            numerics.check(y, *expected(case))
        except AssertionError as error:
            raise AssertionError(f"case {seed}: {case}: {error}") from error
        again = run(case, backend)
        assert torch.equal(y, again), f"case {seed}: two runs differ: {case}"
