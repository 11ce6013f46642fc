"""What a call under torch.autocast must give: the bounds of `numerics`, for x and W rounded to autocast's dtype."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from peftk import functional
from peftk.adapters.adapter import Adapter
from tests.support import numerics
from tests.support.cases import Case, expected, expected_grads, normal

NAMES = ("lora_A", "lora_B", "bias_A", "bias_B")


def make_case(*, many: bool, M: int = 9, K: int = 40, N: int = 24) -> Case:
    """Everything in fp32, with biases and an activation."""

    def adapter(rank: int, activation: str) -> Adapter:
        A, B = normal(rank, K, dtype=torch.float32, seed=rank), normal(N, rank, dtype=torch.float32, seed=rank + 1)
        biases = (normal(size, dtype=torch.float32, seed=size) for size in (rank, N))
        return Adapter((A,), (B,), 0.5, activation, *biases)

    x, weight, bias = (normal(*size, dtype=torch.float32, seed=7) for size in ((M, K), (N, K), (N,)))
    adapters = (adapter(5, "identity"), adapter(3, "relu")) if many else (adapter(5, "relu"),)
    return Case(x, weight, bias, adapters, torch.arange(M, dtype=torch.int32) % 3 - 1 if many else None)


def check(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Forward under autocast, backward outside of it. All Parameters are fp32, and so are their gradients."""
    trained = [{name: _parameter(getattr(a, name)) for name in NAMES} for a in case.adapters if a is not None]
    x, weight, bias = case.x.clone().requires_grad_(), case.weight, case.bias
    assert weight is not None
    assert bias is not None
    with torch.autocast("cpu", dtype=dtype):
        y = _run(case, x, trained, backend)
    low = dataclasses.replace(case, x=case.x.to(dtype), weight=weight.to(dtype))
    product = low.x.double() @ low.weight.double().t()
    # gemm rounds the product, and once more when it adds a bias of another dtype
    by_gemm = backend == "gemm"
    rounded = product.abs() + (product + bias.double()).abs() if by_gemm else None
    assert y.dtype == dtype
    numerics.check(y.detach(), *expected(low), rounded=rounded)

    dy = normal(*y.shape, dtype=dtype, seed=3)
    y.backward(dy)
    dx, grads, magnitude, magnitudes, terms = expected_grads(low, dy)
    assert x.grad is not None
    assert torch.equal(x.grad, x.grad.to(dtype).float())
    base_dx = dy.double() @ low.weight.double() if by_gemm else None
    numerics.check(x.grad.to(dtype), dx, magnitude, terms, rounded=base_dx)
    for parameters, wanted, size in zip(trained, grads, magnitudes, strict=True):
        assert wanted is not None
        assert size is not None
        for name in NAMES:
            got = parameters[name].grad
            assert got is not None, name
            assert got.dtype == torch.float32, name
            numerics.check(got, getattr(wanted, name), getattr(size, name), terms)


def _parameter(tensor: Tensor | None) -> nn.Parameter:
    assert tensor is not None
    return nn.Parameter(tensor.clone())


def _run(case: Case, x: Tensor, trained: list[dict[str, nn.Parameter]], backend: str) -> Tensor:
    def replaced(adapter: Adapter | None, leaves: dict[str, nn.Parameter]) -> Adapter:
        assert adapter is not None
        pages = {"pages_A": (leaves["lora_A"],), "pages_B": (leaves["lora_B"],)}
        return dataclasses.replace(adapter, **pages, bias_A=leaves["bias_A"], bias_B=leaves["bias_B"])

    if case.ids is None:
        [adapter], [leaves] = case.adapters, trained
        assert adapter is not None
        kind = {"scaling": adapter.scaling, "activation": adapter.activation}
        return functional.lora_linear(x, case.weight, case.bias, **leaves, **kind, backend=backend)
    adapters = tuple(map(replaced, case.adapters, trained))
    table = dataclasses.replace(case, adapters=adapters).table()
    return functional.multi_lora_linear(x, case.weight, case.bias, table, case.ids, backend=backend)
