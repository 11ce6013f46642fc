"""csrc/cuda/merge.cu on the host, through peftk.backends.cuda: W', code and W bit for bit the reference's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from peftk import functional, reference
from peftk.backends import cuda as backend
from tests.merge_cases import DTYPES, merge_case, same_bits, several
from tests.on_host.conftest import Executor

SHAPES = [(1, 1, 1), (3, 5, 2), (64, 128, 16), (65, 131, 17), (130, 72, 40), (40, 264, 33)]


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """A copy with the same strides in a heap block of exactly its size, which starts `elements` after a boundary."""
    (N, K), stride = tensor.shape, tensor.stride(0)
    block = torch.zeros(elements + (N - 1) * stride + K, dtype=tensor.dtype)
    return block[elements:].as_strided((N, K), (stride, 1)).copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
def test_bits_of_the_reference(executor: Executor, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    cases = itertools.product(SHAPES, (0.01, 3.0), (0, 8), (0, 1))
    for seed, (shape, size, padding, shift) in enumerate(cases):
        case = merge_case(seed, *shape, dtype, adapter_dtype, size=size, padding=padding)
        weight = shifted(case.weight, shift)  # 1: scalar accesses
        for factors in (case.factors, several(seed, weight, (1, shape[2], 16), size, adapter_dtype)):
            expected, expected_code = reference.merge(weight, factors)
            merged, code = backend.merge(weight, factors)
            assert same_bits(merged, expected), f"{case}"
            assert torch.equal(code, expected_code), f"{case}"
            assert same_bits(backend.unmerge(merged, factors, code), reference.unmerge(merged, factors, code))
    assert executor.statistics.launches == 4 * 48
    assert executor.statistics.resident > 1


def test_the_public_functions() -> None:
    case = merge_case(0, 65, 131, 17, torch.bfloat16, torch.float32, size=1.0, padding=0)
    ours, theirs = case.weight.clone(), case.weight.clone()
    arguments = case.lora_A, case.lora_B, case.scaling
    receipt = functional.merge_(ours, *arguments, backend="cuda")
    functional.merge_(theirs, *arguments, backend="reference")
    assert same_bits(ours, theirs)
    functional.unmerge_(ours, receipt, backend="cuda")
    assert same_bits(ours, case.weight)
