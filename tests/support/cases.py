"""Random cases and their expected results. They are those of `peftk.tools.selftest`, which users run."""

from __future__ import annotations

import torch

from peftk import functional
from peftk.tools.selftest.cases import (
    DTYPES,
    Case,
    decode_adapter,
    decode_case,
    double,
    expected,
    expected_grads,
    normal,
    random_case,
)

__all__ = [
    "DTYPES",
    "Case",
    "decode_adapter",
    "decode_case",
    "double",
    "expected",
    "expected_grads",
    "normal",
    "random_case",
    "run",
]


def run(case: Case, backend: str) -> torch.Tensor:
    """Runs the case through the public functions."""
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
