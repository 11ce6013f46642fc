"""A thousand random cases on every backend that runs on this machine's CPU, within the error bounds."""

from __future__ import annotations

import pytest
import torch

from peftk import functional
from tests.support import numerics
from tests.support.cases import Case, expected, random_case

CHUNK = 50


def run(case: Case, backend: str) -> torch.Tensor:
    if case.ids is None:
        adapter = case.adapters[0]
        if adapter is None:
            return functional.lora_linear(case.x, case.weight, case.bias, backend=backend)
        return functional.lora_linear(
            case.x,
            case.weight,
            case.bias,
            adapter.lora_A,
            adapter.lora_B,
            adapter.scaling,
            activation=adapter.activation,
            bias_A=adapter.bias_A,
            bias_B=adapter.bias_B,
            backend=backend,
        )
    return functional.multi_lora_linear(case.x, case.weight, case.bias, case.table(), case.ids, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("chunk", range(1000 // CHUNK))
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
