"""The gemm backend, torch's product plus peftk's adapters: forward, gradients, one and many adapters."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import peftk
from peftk import functional
from peftk.adapters import table
from peftk.adapters.adapter import Adapter
from peftk.adapters.dropout import Dropout
from peftk.backends import gemm
from tests.support import numerics
from tests.support.calls import call
from tests.support.cases import expected, run
from tests.support.gemm_cases import base_of, cases, check_forward, check_gradients, check_training


def test_random_cases() -> None:
    for seed, case in cases(200):
        try:
            check_forward(case)
        except AssertionError as error:
            raise AssertionError(f"case {seed}: {case}: {error}") from error


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_random_gradients(dropout_p: float) -> None:
    for seed, case in cases(60):
        if case.ids is None and case.adapters[0] is None:
            continue
        try:
            check_gradients(case, Dropout(dropout_p, torch.tensor([77])) if dropout_p else None)
        except AssertionError as error:
            raise AssertionError(f"case {seed}: {case}: {error}") from error


def test_one_adapter_trains_as_the_cpu_kernels_do() -> None:
    check_training("cpu")


def test_the_base_layer_alone_and_a_bias_of_another_dtype() -> None:
    weight, x = torch.randn(9, 8, dtype=torch.bfloat16), torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(functional.lora_linear(x, weight, backend="gemm"), torch.nn.functional.linear(x, weight))
    bias = torch.randn(9)
    y = functional.lora_linear(x, weight, bias, backend="gemm")
    assert torch.equal(y, (torch.nn.functional.linear(x, weight).float() + bias).to(torch.bfloat16))


def test_rows_of_the_base_layer_are_torchs_bits() -> None:
    bank = peftk.AdapterBank(32, 24, 2, torch.float32, torch.device("cpu"))
    bank.add("a", torch.randn(4, 32), torch.randn(24, 4), 1.0)
    weight, bias, x = torch.randn(24, 32), torch.randn(24), torch.randn(6, 32)
    ids = torch.tensor([0, -1, 0, -1, -1, 0])
    y = functional.multi_lora_linear(x, weight, bias, bank, ids, backend="gemm")
    assert torch.equal(y[ids == -1], torch.nn.functional.linear(x, weight, bias)[ids == -1])


def test_calls_it_cannot_run() -> None:
    assert gemm.cannot_run(call()) is None
    assert "one dtype" in str(gemm.cannot_run(call(x_dtype=torch.bfloat16)))
    assert "got merge" in str(gemm.cannot_run(call("merge")))
    assert "cuda tensors" in str(gemm.cannot_run(call(device="mps")))  # or has no Triton
    x, weight = torch.randn(2, 8).bfloat16(), torch.randn(4, 8)
    with pytest.raises(peftk.BackendError, match="needs x and weight of one dtype"):
        functional.lora_linear(x, weight, backend="gemm")


def test_strided_rows() -> None:
    _, case = next(cases(1))
    x = torch.randn(2 * 6, case.x.shape[1]).to(case.x.dtype)[::2]
    ids = None if case.ids is None else torch.full((6,), -1, dtype=torch.int32)
    strided = dataclasses.replace(case, x=x, ids=ids)
    numerics.check(run(strided, "gemm"), *expected(strided), rounded=base_of(strided))


def test_input_gradients_take_torchs_product() -> None:
    """Where the adapter adds nothing, dX has the bits of torch's product."""
    weight, dy, x = torch.randn(500, 300), torch.randn(40, 500), torch.randn(40, 300)
    adapter = Adapter((torch.randn(4, 300),), (torch.zeros(500, 4),), 1.0, "identity", None, None)
    dx, _ = gemm.lora_linear_backward(dy, x, weight, adapter, torch.zeros(40, 4))
    assert torch.equal(dx, torch.mm(dy, weight))
    built = table.build((adapter,), dtype=torch.float32, device=x.device)
    ids = torch.full((40,), -1, dtype=torch.int32)
    dx, _ = gemm.multi_lora_linear_backward(dy, x, weight, built, ids, torch.zeros(40, 16))
    assert torch.equal(dx, torch.mm(dy, weight))
