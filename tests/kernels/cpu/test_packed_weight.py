"""The CPU kernels over packed weights, at every SIMD level: the exact bits of W, values, gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import peftk
from peftk import functional
from peftk.adapters.adapter import AdapterGrads
from peftk.adapters.dropout import Dropout
from peftk.backends import choice, cpu
from peftk.backends.call import BackendError
from peftk.backends.packed import FORMATS
from peftk.quantized.formats import pack_halves
from peftk.quantized.weight import QuantizedWeight
from tests.support import numerics
from tests.support.cases import expected, expected_grads
from tests.support.quantized_cases import quantized_case, random_weight

pytestmark = pytest.mark.usefixtures("level")

# (format, elements of a row that share a scale, dtype of the scales, zeros)
KINDS = [
    ("int8", None, torch.float32, False),
    ("int8", 32, torch.float16, False),
    ("int8", 128, torch.bfloat16, False),
    ("int8_absmax", None, torch.float32, False),
    ("int4", 32, torch.float16, True),
    ("int4", 64, torch.float32, False),
    ("int4", 128, torch.bfloat16, True),
    ("nf4", 64, torch.float32, False),
    ("fp4", 32, torch.float32, False),
    ("q8_0", None, torch.float32, False),
    ("q4_0", None, torch.float32, False),
]
TOKENS = (1, 2, 3, 4, 5, 7, 10, 11, 16, 17, 40, 100)


def weight_of(kind: tuple[str, int | None, torch.dtype, bool], N: int, K: int, seed: int = 0) -> QuantizedWeight:
    format, group, scale_dtype, zeros = kind
    return random_weight(format, N, K, group=group, scale_dtype=scale_dtype, zeros=zeros, seed=seed)


def bits(tensor: Tensor) -> Tensor:
    return (tensor + 0.0).view(torch.int32)  # −0 becomes 0, as in a sum


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("M", [1, 7, 16, 40, 130])
def test_every_element_is_exactly_what_the_format_says(kind, M: int):
    """A row of x with a single 1 gives a column of W, and a row of dY a row: all other terms are zeros."""
    N, K = 70, 384
    weight = weight_of(kind, N, K)
    W = weight.dequantize()
    columns = torch.randperm(K)[:M] if M < K else torch.arange(M) % K
    y = cpu.lora_linear(torch.eye(K)[columns], weight, None, None)[0]
    rows = torch.arange(M) % N
    dx = cpu.lora_linear_backward(torch.eye(N)[rows], None, weight, None, None)[0]
    if kind[0] == "int8_absmax":  # the scale is multiplied by 1/127 first: two roundings in another order
        torch.testing.assert_close(y, W.t()[columns], rtol=2**-22, atol=0)
        torch.testing.assert_close(dx, W[rows], rtol=2**-22, atol=0)
        return
    assert torch.equal(bits(y), bits(W.t()[columns].contiguous()))
    assert torch.equal(bits(dx), bits(W[rows]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_cases(kind):
    format, group, scale_dtype, zeros = kind
    options = {"group": group, "scale_dtype": scale_dtype, "zeros": zeros} if group != 128 else {"group": 32}
    for seed in range(8):
        case, plain = quantized_case(format, seed, **options)
        for M in (case.x.shape[0], *(m for m in TOKENS[seed % 3 :: 3] if m <= case.x.shape[0])):
            part = [dataclasses.replace(c, x=c.x[:M], ids=None if c.ids is None else c.ids[:M]) for c in (case, plain)]
            check(*part)


def check(case, plain, **kwargs):
    one = case.ids is None
    adapters = case.adapters[0] if one else case.table()
    rest = () if one else (case.ids,)
    forward, backward = (
        (cpu.lora_linear, cpu.lora_linear_backward) if one else (cpu.multi_lora_linear, cpu.multi_lora_linear_backward)
    )
    y, z = forward(case.x, case.weight, case.bias, adapters, *rest, save_z=True, **kwargs)
    numerics.check(y, *expected(plain, **kwargs))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    dx, grads = backward(dy, case.x, case.weight, adapters, *rest, z, **kwargs)
    dx64, grads64, dx_magnitude, magnitudes, terms = expected_grads(plain, dy, **kwargs)
    numerics.check(dx, dx64, dx_magnitude, terms)
    for actual, wanted, magnitude in zip([grads] if one else grads, grads64, magnitudes, strict=True):
        for name in AdapterGrads._fields if actual is not None else ():
            grad = getattr(actual, name)
            if grad is not None and getattr(wanted, name) is not None:
                numerics.check(grad, getattr(wanted, name), getattr(magnitude, name), terms)


@pytest.mark.parametrize("format", ["int8", "int4", "nf4", "q4_0"])
def test_dropout(format: str):
    for seed in range(4):
        case, plain = quantized_case(format, seed)
        check(case, plain, dropout=Dropout(0.3, torch.tensor([seed])))


@pytest.mark.parametrize("K", [2, 31, 33, 67, 100, 200])
@pytest.mark.parametrize("M", [1, 5, 40])
def test_int8_rows_of_any_length(K: int, M: int):
    """One scale a row: K need not be a multiple of 32."""
    weight = random_weight("int8", 37, K)
    x = torch.eye(K)[torch.arange(M) % K]
    y = cpu.lora_linear(x, weight, None, None)[0]
    assert torch.equal(bits(y), bits(weight.dequantize().t()[torch.arange(M) % K].contiguous()))
    dx = cpu.lora_linear_backward(torch.eye(37)[torch.arange(M) % 37], None, weight, None, None)[0]
    assert torch.equal(bits(dx), bits(weight.dequantize()[torch.arange(M) % 37]))


def test_long_contractions():
    """Several parts of sums, on large layers; terms of one sign, whose errors do not cancel."""
    for kind in KINDS:
        weight = weight_of(kind, 33, 8192)
        x = weight.dequantize().sign()[:5]
        for M in (1, 5):
            y = cpu.lora_linear(x[:M], weight, None, None)[0]
            wide = weight.dequantize().double()
            numerics.check(y, x[:M].double() @ wide.t(), x[:M].double().abs() @ wide.abs().t(), 8192)


def test_infinite_scales_stay_in_their_rows():
    weight = random_weight("int8", 8, 64)
    weight.scales[3] = torch.inf
    y = cpu.lora_linear(torch.ones(2, 64), weight, None, None)[0]
    assert bool(y[:, [0, 1, 2, 4, 5, 6, 7]].isfinite().all())
    assert not bool(y[:, 3].isfinite().any())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_batch_invariant(kind):
    """A row has the same bits alone and among others."""
    weight, x = weight_of(kind, 70, 384), torch.randn(40, 384)
    with peftk.deterministic(batch_invariant=True):
        whole = functional.lora_linear(x, weight)
        for M in (1, 3, 9, 17):
            assert torch.equal(functional.lora_linear(x[:M], weight), whole[:M])


def test_threads_change_no_bit():
    before = torch.get_num_threads()
    for kind in KINDS[::3]:
        weight = weight_of(kind, 300, 512)
        for M in (1, 12, 64):
            x, found = torch.randn(M, 512), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y, dx = cpu.lora_linear(x, weight, None, None)[0], None
                dx = cpu.lora_linear_backward(y, None, weight, None, None)[0]
                found.append((y, dx))
            torch.set_num_threads(before)
            assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, found[0], strict=True))


def test_it_is_chosen():
    for format in FORMATS:
        weight = random_weight(format, 64, 128)
        x = torch.randn(3, 128, dtype=torch.bfloat16)
        y = functional.lora_linear(x, weight)
        assert torch.equal(y, functional.lora_linear(x, weight, backend="cpu"))


def test_what_it_cannot_read():
    weight = QuantizedWeight(
        "int4", (4, 96), pack_halves(torch.zeros(4, 96, dtype=torch.uint8)), torch.ones(4, 1), block=(1, 96)
    )
    assert torch.equal(cpu.lora_linear(torch.eye(96), weight, None, None)[0], weight.dequantize().t())  # one group
    ragged = random_weight("nf4", 4, 96)  # groups of 64 that cross rows
    with pytest.raises(BackendError, match="needs groups of 32, 64, 128, … elements that divide K = 96"):
        functional.lora_linear(torch.randn(2, 96), ragged, backend="cpu")
    torch.testing.assert_close(functional.lora_linear(torch.eye(96), ragged), ragged.dequantize().t())


def test_explain_says_so():
    from peftk.backends.call import Packing
    from tests.support.calls import call

    found = choice.choose_and_describe(call(M=1, K=128, N=64, packing=Packing("nf4", 64)))
    assert found.backend == "cpu"
    assert "dot form, nf4 decoded in it" in found.kernel
