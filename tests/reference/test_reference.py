"""The specification against torch.autograd and against known answers."""

from __future__ import annotations

import ctypes
import ctypes.util

import pytest
import torch

from peftk.adapters import activations
from peftk.adapters.adapter import Adapter
from peftk.adapters.dropout import Dropout
from peftk.backends import reference
from peftk.reference import philox
from peftk.reference.merge import _delta, factors


def test_philox_columns_are_those_of_the_whole_mask() -> None:
    seed = torch.tensor([987654321012])
    for rows, columns in ((5, 13), (1, 8), (4, 3)):
        whole = philox.keep_mask(rows, columns, 0.4, seed)
        for first in range(columns):
            for last in range(first + 1, columns + 1):
                part = philox.keep_mask_of_columns(rows, columns, first, last, 0.4, seed)
                assert torch.equal(part, whole[:, first:last]), (rows, columns, first, last)


def test_philox_known_answers() -> None:
    # Random123's kat_vectors for philox4x32-10: counter 0, key 0; and counter, key all ones
    words = philox._philox(torch.zeros(1, dtype=torch.int64), torch.tensor(0))
    assert [int(w[0]) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_dropout_share_and_independence_of_tiling() -> None:
    seed = torch.tensor([2**61 + 12345])
    mask = philox.keep_mask(300, 257, 0.3, seed)
    assert abs(float(mask.float().mean()) - 0.7) < 0.01
    assert torch.equal(mask, philox.keep_mask(300, 257, 0.3, seed))
    assert not torch.equal(mask, philox.keep_mask(300, 257, 0.3, seed + 1))


@pytest.mark.parametrize("activation", activations.CODES)
def test_activation_derivatives(activation: str) -> None:
    z = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    activations.apply(activation, z).sum().backward()
    torch.testing.assert_close(activations.derivative(activation, z.detach()), z.grad)


@pytest.mark.parametrize("activation", activations.CODES)
def test_backward_is_the_gradient_of_the_forward(activation: str) -> None:
    torch.manual_seed(0)
    kwargs = {"dtype": torch.float64, "requires_grad": True}
    x, A, B = torch.randn(6, 9, **kwargs), torch.randn(4, 9, **kwargs), torch.randn(5, 4, **kwargs)
    a, b = torch.randn(4, **kwargs), torch.randn(5, **kwargs)
    weight, dy = torch.randn(5, 9, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    seed = torch.tensor([3])
    adapter = Adapter((A,), (B,), 1.7, activation, a, b)
    y, z = reference.lora_linear(x, weight, None, adapter, dropout=Dropout(0.2, seed), save_z=True)
    y.backward(dy)
    dx, grads = reference.lora_linear_backward(dy, x.detach(), weight, adapter, z.detach(), dropout=Dropout(0.2, seed))
    for tensor, grad in zip((x, A, B, a, b), (dx, *grads), strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_merge_chain_is_libm_fma() -> None:
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    torch.manual_seed(0)
    # of very different scales, so that every step rounds and some sums are denormal
    A, B = torch.randn(7, 12) * 10.0 ** torch.randint(-22, 3, (7, 12)), torch.randn(9, 7) * 1e-20
    d = _delta(torch.zeros(9, 12), factors([A], [B], [1.0]))
    for n in range(9):
        for j in range(12):
            t = 0.0
            for k in range(7):
                t = libm.fmaf(B[n, k].item(), A[k, j].item(), t)
            assert t == d[n, j].item()
