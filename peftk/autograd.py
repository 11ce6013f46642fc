"""Gradients in eager mode: torch.autograd Functions that call the backend directly.

They save x, z (the R pre-activations of each row, fp32) and the adapter: nothing of the size of [M, N], no mask.
W is frozen, so it has no gradient; the backward of the backward is not defined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftk import dispatch
from peftk.reference import AdapterGrads, Wanted
from peftk.table import Adapter, AdapterTable


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
    scaling: float,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> Tensor:
    if torch.is_grad_enabled() and _wants_grad(x, bias, lora_A, lora_B, bias_A, bias_B):
        return _LoraLinear.apply(
            x, weight, bias, lora_A, lora_B, bias_A, bias_B, seed, scaling, activation, dropout_p, backend
        )
    adapter = dispatch.adapter_of(lora_A, lora_B, bias_A, bias_B, scaling, activation)
    return dispatch.lora_linear(x, weight, bias, adapter, dropout_p, seed, backend, False)[0]


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> Tensor:
    if torch.is_grad_enabled():
        tensors = flat_tensors(table.adapters)
        if _wants_grad(x, bias, *tensors):
            return _MultiLoraLinear.apply(x, weight, bias, ids, seed, table, dropout_p, backend, *tensors)
    return dispatch.multi_lora_linear(x, weight, bias, table, ids, dropout_p, seed, backend, False)[0]


class _Final(torch.autograd.Function):
    """Gradients as they are, that depend on `sources` in a way nobody can differentiate: an error for who tries."""

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor | None], *sources: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(grads)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "peftk: expected one backward, got a second through its gradients (create_graph); the transforms of "
            "torch.func compute these: torch.func.hessian, jvp of grad, …"
        )


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """As torch's, but whoever differentiates a gradient gets an error even where unused ones are allowed.

    (torch's gradients hang on nothing, so that `torch.autograd.functional.jvp` and `hvp` take their zeros for answers.)
    """

    @functools.wraps(backward)
    def once(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = backward(ctx, dy)
        if not torch.is_grad_enabled():
            return grads
        return _Final.apply(grads, *(t for t in (dy, *ctx.saved_tensors) if t is not None and t.requires_grad))

    return once


def _wants_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        bias_A: Tensor | None,
        bias_B: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        activation: str,
        dropout_p: float,
        backend: str | None,
    ) -> Tensor:
        adapter = dispatch.adapter_of(lora_A, lora_B, bias_A, bias_B, scaling, activation)
        y, z = dispatch.lora_linear(x, weight, bias, adapter, dropout_p, seed, backend, True)
        ctx.save_for_backward(x, weight, bias, lora_A, lora_B, bias_A, bias_B, seed, z)
        ctx.rest = (scaling, activation, dropout_p, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, lora_A, lora_B, bias_A, bias_B, seed, z = ctx.saved_tensors
        scaling, activation, dropout_p, backend = ctx.rest
        adapter = dispatch.adapter_of(lora_A, lora_B, bias_A, bias_B, scaling, activation)
        needs = ctx.needs_input_grad
        dx, grads = dispatch.lora_linear_backward(
            dy, x, weight, adapter, z, dropout_p, seed, backend, needs[0], Wanted(*needs[3:7])
        )
        dbias = dispatch.bias_grad(dy, bias) if needs[2] else None
        return dx, None, dbias, *grads, None, None, None, None, None


class _MultiLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        ids: Tensor,
        seed: Tensor | None,
        table: AdapterTable,
        dropout_p: float,
        backend: str | None,
        *tensors: Tensor,
    ) -> Tensor:
        y, z = dispatch.multi_lora_linear(x, weight, bias, table, ids, dropout_p, seed, backend, True)
        # the adapters' tensors are saved so that autograd notices when one was changed in place before the backward
        ctx.save_for_backward(x, weight, bias, ids, seed, z, *tensors)
        ctx.rest = (table, dropout_p, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, ids, seed, z = ctx.saved_tensors[:6]
        table, dropout_p, backend = ctx.rest
        needs = ctx.needs_input_grad
        wanted = flat_wanted(table.adapters, needs[8:])
        dx, grads = dispatch.multi_lora_linear_backward(
            dy, x, weight, table, ids, z, dropout_p, seed, backend, needs[0], wanted
        )
        dbias = dispatch.bias_grad(dy, bias) if needs[2] else None
        return dx, None, dbias, None, None, None, None, None, *flat_grads(table.adapters, grads)


def flat_tensors(adapters: tuple[Adapter | None, ...]) -> list[Tensor]:
    """All adapters' tensors in one list: each adapter's pages of A, pages of B, bias_A and bias_B where there are."""
    return [tensor for adapter in adapters if adapter is not None for tensor in adapter.tensors()]


def flat_wanted(adapters: tuple[Adapter | None, ...], needs: Sequence[bool]) -> list[Wanted]:
    """Which gradients each adapter's tensors need, from one answer for each of `flat_tensors`."""
    remaining, wanted = list(needs), []

    def take(count: int) -> bool:
        taken, remaining[:count] = any(remaining[:count]), []
        return taken

    for a in adapters:
        pages = 0 if a is None else len(a.pages_A)
        has_A, has_B = a is not None and a.bias_A is not None, a is not None and a.bias_B is not None
        wanted.append(Wanted(take(pages), take(pages), take(has_A), take(has_B)))
    return wanted


def flat_grads(adapters: tuple[Adapter | None, ...], grads: list[AdapterGrads | None]) -> list[Tensor | None]:
    """The gradients in the order of `flat_tensors`, those of A and B cut into the adapter's pages."""
    flat: list[Tensor | None] = []
    for adapter, grad in zip(adapters, grads, strict=True):
        if adapter is None or grad is None:
            continue
        sizes = [page.shape[0] for page in adapter.pages_A]
        for whole, dim in ((grad.lora_A, 0), (grad.lora_B, 1)):
            flat += [None] * len(sizes) if whole is None else whole.split(sizes, dim=dim)
        flat += [grad.bias_A] if adapter.bias_A is not None else []
        flat += [grad.bias_B] if adapter.bias_B is not None else []
    return flat
