"""Gradients of the Triton backend in the interpreter, against the fp64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.support.cases import normal, random_case
from tests.support.gradients import check_gradients
from tests.support.tiers import spread
from tests.support.triton_cases import far_apart, with_far_rows


@pytest.mark.parametrize("number", spread(range(120), default=4, full=23))
def test_random_gradients(number: int) -> None:
    case = random_case(20_000 + number, max_rows=40, max_width=80)
    dtypes = {case.x.dtype, case.weight.dtype, *(t.dtype for a in case.adapters if a is not None for t in a.tensors())}
    if {torch.bfloat16, torch.float16} <= dtypes:
        pytest.skip("bfloat16 and float16 in one call are not served")
    dropout_p = 0.25 if number % 4 == 0 else 0.0
    seed = torch.tensor([number * 7919]) if dropout_p else None
    dy = torch.randn(case.x.shape[0], case.weight.shape[0]).to(case.x.dtype)
    check_gradients(case, dy, "triton", dropout_p, seed)


@pytest.mark.parametrize(
    ("which", "many"), spread(itertools.product(("x", "weight", "A", "B", "dy"), (False, True)), default=3)
)
def test_rows_beyond_32_bits(which: str, many: bool) -> None:
    dy = normal(4, 4, dtype=torch.bfloat16, seed=9)
    check_gradients(with_far_rows(which, many), far_apart(dy) if which == "dy" else dy, "triton", 0.0, None)
