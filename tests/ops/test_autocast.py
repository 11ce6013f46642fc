"""Calls and layers under torch.autocast: values, gradients, and what reaches a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk import functional
from peftk.backends import choice
from peftk.backends.call import Call
from peftk.system import autocast
from tests.support.autocast_cases import check, make_case

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
K, N = 48, 40


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls that a backend was chosen for."""
    found: list[Call] = []
    backend_for = choice.backend_for

    def record(call: Call, forced: str | None = None) -> object:
        found.append(call)
        return backend_for(call, forced)

    monkeypatch.setattr(choice, "backend_for", record)
    return found


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "gemm"])
def test_values_and_gradients(backend: str, many: bool, dtype: torch.dtype) -> None:
    check(make_case(many=many), backend, dtype)


def test_a_backward_inside_autocast_gives_the_same() -> None:
    """Also by backends that multiply in torch: their fp32 products stay fp32."""
    weight, A, B = torch.randn(N, K), torch.randn(3, K), torch.randn(N, 3)
    dy = torch.randn(5, N)

    def grads(backend: str, inside: bool) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (torch.ones(5, K), A, B)]
        y = functional.lora_linear(leaves[0], weight, None, *leaves[1:], backend=backend)
        with torch.autocast("cpu", dtype=BF16, enabled=inside):
            y.backward(dy)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for backend in ("reference", "gemm", "cpu"):
        for got, wanted in zip(grads(backend, True), grads(backend, False), strict=True):
            assert torch.equal(got, wanted), backend


def lora() -> nn.Module:
    return peftk.LoRALinear.from_linear(nn.Linear(K, N), r=3)


def conv1d() -> nn.Module:
    return peftk.LoRALinear.from_linear(pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K), r=3)


def multi() -> nn.Module:
    layer = peftk.MultiLoRALinear.from_linear(nn.Linear(K, N), max_adapters=2, adapter_dtype=F32)
    layer.add_adapter("one", torch.randn(3, K), torch.randn(N, 3), trainable=True)
    return layer


def accelerated() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["0"])
    return peftk.accelerate(peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)).base_model.model[0]


def run(layer: nn.Module, x: Tensor) -> Tensor:
    ids = (torch.zeros(len(x), dtype=torch.int32),) if isinstance(layer, peftk.MultiLoRALinear) else ()
    y: Tensor = layer(x, *ids)
    return y


@pytest.mark.parametrize("make", [lora, conv1d, multi, accelerated])
@pytest.mark.parametrize("weight_dtype", [F32, F16], ids=str)
def test_a_layer_multiplies_one_dtype_and_casts_its_weight_once(
    make: Callable[[], nn.Module], weight_dtype: torch.dtype, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make()
    for name, parameter in layer.named_parameters():
        if name in ("weight", "base_layer.weight"):
            parameter.data = parameter.data.to(weight_dtype)
    x, weights = torch.randn(5, K, requires_grad=True), []
    cast = autocast.cast

    def record(*args: Any, **kwargs: Any) -> Any:
        found = cast(*args, **kwargs)
        weights.append(found[1])
        return found

    monkeypatch.setattr(autocast, "cast", record)
    with torch.autocast("cpu", dtype=BF16):
        loss = sum(run(layer, x).float().sum() for _ in range(3))
    loss.backward()
    assert len(weights) == 3
    if weight_dtype == F32:
        assert weights[0] is weights[1] is weights[2]
    assert len(calls) >= 6
    assert {(call.x_dtype, call.weight_dtype) for call in calls} == {(BF16, BF16)}
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) >= 2
    assert all(p.grad is not None and p.grad.dtype == p.dtype == F32 for p in trained)
    assert x.grad is not None
    assert x.grad.dtype == F32


@pytest.mark.parametrize("make", [lora, multi, accelerated])
def test_compiled_as_eager(make: Callable[[], nn.Module]) -> None:
    layer, x = make(), torch.randn(5, K)
    compiled = torch.compile(lambda x: run(layer, x), backend="aot_eager", fullgraph=make is not accelerated)
    with torch.autocast("cpu", dtype=BF16):
        expected, got = run(layer, x), compiled(x)
    assert got.dtype == BF16
    assert torch.equal(got, expected)


def test_a_layer_merged_inside_autocast() -> None:
    """The merge changes W in place, so its cast is made anew."""
    layer, x = lora().eval(), torch.randn(5, K)
    nn.init.normal_(layer.lora_B)
    with torch.autocast("cpu", dtype=BF16), torch.no_grad():
        before = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), before, rtol=3e-2, atol=3e-2)
        layer.unmerge()
        assert torch.equal(layer(x), before)


def test_explain_knows_autocast() -> None:
    layer = lora()
    with torch.autocast("cpu", dtype=BF16):
        assert peftk.explain(layer, torch.randn(5, K), backend="gemm").backend == "gemm"
    layer.half()
    with pytest.raises(peftk.BackendError, match="one dtype"):
        peftk.explain(layer, torch.randn(5, K), backend="gemm")
    with torch.autocast("cpu", dtype=BF16):
        peftk.explain(layer, torch.randn(5, K), backend="gemm")
