"""Calls under torch.autocast by the Triton kernels, and by torch's product with Triton's adapters on top."""

from __future__ import annotations

import pytest
import torch

from tests.support.autocast_cases import check, make_case


@pytest.mark.parametrize("backend", ["triton", "gemm"])
@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_values_and_gradients(many: bool, backend: str) -> None:
    check(make_case(many=many), backend, torch.bfloat16)
