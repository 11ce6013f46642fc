"""What the gemm backend must give: the product is rounded before the adapters are added, and that has its bound."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftk import functional
from peftk.adapters.dropout import Dropout
from peftk.backends import gemm
from tests.support import numerics
from tests.support.cases import Case, expected, expected_grads, random_case, run


def cases(count: int, first_seed: int = 70_000, **sizes: int) -> Iterator[tuple[int, Case]]:
    """Random cases with x and weight of one dtype. `sizes`: of `random_case`."""
    seed = first_seed
    while count:
        case, seed = random_case(seed, **sizes), seed + 1
        if case.x.dtype == case.weight.dtype:
            yield seed - 1, case
            count -= 1


def base_of(case: Case) -> Tensor:
    y = case.x.double() @ case.weight.double().t()
    return y if case.bias is None else y + case.bias.double()


def check_forward(case: Case) -> None:
    numerics.check(run(case, "gemm"), *expected(case), rounded=base_of(case))


def check_gradients(case: Case, dropout: Dropout | None) -> None:
    dy = torch.randn(case.x.shape[0], case.weight.shape[0]).to(case.x.dtype)
    table = case.table()
    ids = torch.zeros(case.x.shape[0], dtype=torch.int32) if case.ids is None else case.ids
    _, z = gemm.multi_lora_linear(case.x, case.weight, case.bias, table, ids, save_z=True, dropout=dropout)
    assert z is not None
    dx, grads = gemm.multi_lora_linear_backward(dy, case.x, case.weight, table, ids, z, dropout=dropout)
    dx_expected, grads_expected, magnitude, magnitudes, terms = expected_grads(case, dy, dropout=dropout)
    assert dx is not None
    numerics.check(dx, dx_expected, magnitude, terms, rounded=dy.double() @ case.weight.double())
    for got, wanted, size in zip(grads, grads_expected, magnitudes, strict=True):
        for g, w, m in zip(got or (), wanted or (), size or (), strict=True):
            if g is not None:
                numerics.check(g, w, m, terms)


def check_training(beside: str) -> None:
    """One adapter's y and gradients are those of the backend whose kernels add it, which multiplies itself."""
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 48), torch.randn(40)
    values = {"x": torch.randn(70, 48), "lora_A": torch.randn(5, 48), "lora_B": torch.randn(40, 5)}
    dy, seed = torch.randn(70, 40), torch.tensor([3])

    def step(backend: str) -> list[Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        y = functional.lora_linear(
            weight=weight, bias=bias, scaling=0.5, dropout_p=0.2, seed=seed, backend=backend, **leaves
        )
        y.backward(dy)
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    for got, wanted in zip(step("gemm"), step(beside), strict=True):
        torch.testing.assert_close(got, wanted)
