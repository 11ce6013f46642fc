"""The gemm backend's adapters by Triton in the interpreter: added in place to a product that torch has made."""

from __future__ import annotations

import pytest
import torch

from peftk.adapters.dropout import Dropout
from tests.support.gemm_cases import cases, check_forward, check_gradients, check_training
from tests.support.tiers import spread

F16 = {torch.bfloat16, torch.float16}
CASES = [
    case
    for _, case in cases(60, 71_000, max_rows=40, max_width=80)
    if not {case.x.dtype, *(t.dtype for a in case.adapters if a is not None for t in a.tensors())} >= F16
]


@pytest.mark.parametrize("number", spread(range(len(CASES)), default=5, full=20))
def test_forward(number: int) -> None:
    check_forward(CASES[number])


@pytest.mark.parametrize("number", spread(range(len(CASES)), default=3, full=17))
def test_gradients(number: int) -> None:
    case = CASES[number]
    if case.ids is None and case.adapters[0] is None:
        pytest.skip("no adapter")
    check_gradients(case, Dropout(0.3, torch.tensor([number])) if number % 3 == 0 else None)


def test_one_adapter_trains_as_by_our_own_product() -> None:
    check_training("triton")
