"""The operations over a quantized weight: what the dequantized one gives, within the known bound, and its gradients."""

from __future__ import annotations

import pytest
import torch

from peftk import functional
from peftk.backends import choice
from peftk.backends.call import BackendError, Packing
from peftk.quantized.formats import FORMATS
from peftk.quantized.quantize import quantize
from peftk.quantized.weight import QuantizedWeight
from tests.support import numerics
from tests.support.calls import call
from tests.support.cases import expected, run
from tests.support.quantized_cases import quantized_case, random_weight


@pytest.mark.parametrize("format", FORMATS)
def test_reference_forward(format: str):
    for seed in range(6):
        case, plain = quantized_case(format, seed)
        y = run(case, "reference")
        assert y.dtype == case.x.dtype
        numerics.check(y, *expected(plain))


@pytest.mark.parametrize("format", FORMATS)
def test_autograd(format: str):
    """Gradients of x, bias and the adapter are those of the dequantized weight; W has none."""
    weight = random_weight(format, 64, 128)
    W = weight.dequantize()
    tensors = [torch.randn(5, 128), torch.randn(64), torch.randn(4, 128) * 0.1, torch.randn(64, 4)]
    grads = []
    for operand in (weight, W):
        x, bias, A, B = leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = functional.lora_linear(x, operand, bias, A, B, 0.5, backend="reference")
        (y * torch.arange(64)).sum().backward()
        grads.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*grads, strict=True):
        assert torch.equal(ours, plain)
    assert weight.grad is None


def test_the_reference_runs_what_no_kernel_reads():
    weight = random_weight("mxfp4", 64, 128)
    x = torch.randn(3, 128)
    found = choice.choose(call(M=3, K=128, N=64, packing=Packing("mxfp4", 32)))
    assert found.backend == "reference"
    assert ("cpu", "does not read weights packed as mxfp4") in found.rejected
    assert torch.equal(functional.lora_linear(x, weight), functional.lora_linear(x, weight, backend="reference"))
    with pytest.raises(BackendError, match="does not read weights packed as mxfp4"):
        functional.lora_linear(x, weight, backend="cpu")
    with pytest.raises(BackendError, match="does not read weights packed as mxfp4"):
        functional.lora_linear(x, weight, backend="gemm")


def test_gemm_is_not_asked():
    found = choice.choose(call(M=512, K=4096, N=4096, x_dtype=torch.float32, packing=Packing("nf4", 64)))
    assert found.backend != "gemm"
    assert not found.unmeasured


@pytest.mark.parametrize("format", ["int8", "nf4", "mxfp4"])
def test_torch_func_and_forward_ad(format: str):
    """Transforms compute in plain torch, with the dequantized weight."""
    weight = random_weight(format, 32, 64)
    W, x = weight.dequantize(), torch.randn(4, 64)
    mapped = torch.vmap(lambda row: functional.lora_linear(row, weight))(x)
    torch.testing.assert_close(mapped, x @ W.t())
    _, tangent = torch.func.jvp(lambda x: functional.lora_linear(x, weight), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.ones_like(x) @ W.t())


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
def test_compiled(format: str):
    """torch.compile dequantizes it in its graph."""
    weight = random_weight(format, 32, 64)
    A, B = torch.randn(2, 64), torch.randn(32, 2)
    compiled = torch.compile(lambda x: functional.lora_linear(x, weight, None, A, B), backend="aot_eager")
    x = torch.randn(4, 64, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, functional.lora_linear(x, weight, None, A, B))
    y.sum().backward()
    torch.testing.assert_close(x.grad, (weight.dequantize() + B @ A).sum(0).expand(4, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype):
    """x is cast, W stays packed."""
    weight, x = random_weight("int8", 32, 64), torch.randn(4, 64)
    with torch.autocast("cpu", dtype):
        y = functional.lora_linear(x, weight)
    assert torch.equal(y, functional.lora_linear(x.to(dtype), weight))


def test_a_merge_is_refused():
    weight = random_weight("int8", 32, 64)
    with pytest.raises(TypeError, match="weight: expected a dense tensor, got a QuantizedWeight"):
        functional.merge_(weight, torch.zeros(1, 64), torch.zeros(32, 1))


def _other_shape(weight: torch.nn.Parameter) -> None:
    weight.data = quantize(torch.randn(256, 512), "int8")


def _freed(weight: QuantizedWeight) -> None:
    weight.packed.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_shape, "packed: expected shape"),
        (lambda weight: setattr(weight, "packed", weight.packed[:1, :1].contiguous()), "packed: expected shape"),
        (lambda weight: setattr(weight, "block", (1, 32)), "scales: expected shape"),
        (lambda weight: setattr(weight, "scales", weight.scales[:1].contiguous()), "scales: expected shape"),
        (_freed, "packed: expected a dense tensor, got one whose memory has 0 of"),
    ],
)
def test_parts_that_do_not_fit_any_more(change, message: str):
    """No call reads memory that a part no longer has."""
    weight = torch.nn.Parameter(quantize(torch.randn(64, 128), "int8"), requires_grad=False)
    change(weight)
    K = weight.shape[1]
    for M in (1, 40):
        with pytest.raises((ValueError, TypeError), match=message):
            functional.lora_linear(torch.randn(M, K), weight, None, torch.randn(4, K), torch.randn(weight.shape[0], 4))
    with pytest.raises((ValueError, TypeError), match=message):
        weight.dequantize()
