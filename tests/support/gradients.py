"""Checks the gradients of a random case on a backend against the fp64 reference."""

from __future__ import annotations

import torch

from peftk import functional
from peftk.adapters.dropout import dropout_from
from peftk.adapters.flat import flat_tensors
from tests.support import numerics
from tests.support.cases import Case, expected_grads


def check_gradients(case: Case, dy: torch.Tensor, backend: str, dropout_p: float, seed: torch.Tensor | None) -> None:
    x = case.x.detach().requires_grad_()
    tensors = [t.requires_grad_() for t in flat_tensors(case.adapters)]
    kwargs = {"backend": backend, "dropout_p": dropout_p, "seed": seed}
    if case.ids is None:
        adapter = case.adapters[0]
        A, B, a, b = (
            (None,) * 4 if adapter is None else (adapter.lora_A, adapter.lora_B, adapter.bias_A, adapter.bias_B)
        )
        s, activation = (1.0, "identity") if adapter is None else (adapter.scaling, adapter.activation)
        y = functional.lora_linear(
            x, case.weight, case.bias, A, B, s, activation=activation, bias_A=a, bias_B=b, **kwargs
        )
    else:
        y = functional.multi_lora_linear(x, case.weight, case.bias, case.table(), case.ids, **kwargs)
    y.backward(dy)
    dx, grads, dx_magnitude, magnitudes, terms = expected_grads(case, dy, dropout=dropout_from(dropout_p, seed))
    assert x.grad is not None
    numerics.check(x.grad, dx, dx_magnitude, terms)
    wanted = flatten(case.adapters, grads)
    bounds = flatten(case.adapters, magnitudes)
    assert len(tensors) == len(wanted) == len(bounds)
    for tensor, grad, magnitude in zip(tensors, wanted, bounds, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        numerics.check(tensor.grad, grad, magnitude, terms)


def flatten(adapters, grads):  # type: ignore[no-untyped-def]
    flat = []
    for adapter, grad in zip(adapters, grads, strict=True):
        if adapter is not None:
            present = (
                bool(adapter.pages_A),
                bool(adapter.pages_A),
                adapter.bias_A is not None,
                adapter.bias_B is not None,
            )
            flat += [g for g, there in zip(grad, present, strict=True) if there]
    return flat
