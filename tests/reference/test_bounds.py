"""The bound for sums on tensor cores holds in a model of them, and the bound for rounded sums does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peftk.reference import bounds


def toward_zero(x: np.ndarray) -> np.ndarray:
    """fp64 x cut to fp32."""
    rounded = x.astype(np.float32)
    over = np.abs(rounded.astype(np.float64)) > np.abs(x)
    return np.where(over, np.nextafter(rounded, np.float32(0)), rounded).astype(np.float64)


def truncated_sum(products: np.ndarray) -> np.ndarray:
    """Row sums, 16 products a step, as tests/cuda_emulator/tensor_cores.cpp describes them."""
    total = np.zeros(len(products))
    for step in products.reshape(len(products), -1, 16).transpose(1, 0, 2):
        terms = np.concatenate([step, total[:, None]], axis=1)
        unit = np.ldexp(1.0, np.frexp(np.abs(terms).max(axis=1))[1] - 25)[:, None]
        total = toward_zero((np.trunc(terms / unit) * unit).sum(axis=1))
    return total


@pytest.mark.parametrize("K", [256, 4096, 32768])
@pytest.mark.parametrize("sign", ["random", "positive"])
def test_truncated_sums(K: int, sign: str) -> None:
    x, w = (torch.randn(48, K, generator=torch.Generator().manual_seed(seed)).bfloat16().double() for seed in (0, 1))
    products = (x * w) if sign == "random" else (x * w).abs()
    got, exact, size = torch.from_numpy(truncated_sum(products.numpy())), products.sum(1), products.abs().sum(1)
    error = (got - exact).abs()
    assert bool((error <= bounds.bound(exact, size, K, torch.float32, truncated=True)).all())
    rounded = bounds.bound(exact, size, K, torch.float32)
    assert bool((error <= rounded).all()) == (sign == "random" or K < 1024)


def test_results_on_a_gpu_may_have_been_truncated() -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    exact = torch.ones(4, dtype=torch.float64)
    expected = bounds.Expected(exact, exact, 4096, exact, torch.zeros_like(exact))
    off = (exact + 4096 * 2.0**-25).float()
    assert bounds.error(off, expected, fused=True) > 1.0
    assert bounds.error(off.as_subclass(OnGpu), expected, fused=True) <= 1.0
