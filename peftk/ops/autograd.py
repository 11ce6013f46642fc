"""Gradients in eager mode: torch.autograd Functions that call the backend directly.

They save what the gradients that are asked for read, and no more (`peftk.ops.saved`): nothing of the size of [M, N], no
mask, and of W, A and B no copies. Saved tensors that somebody changes in place before the backward make it raise, as in
torch. What a Function returns is no view and nobody else's memory, so it may be changed in place. W is frozen, so it
has no gradient; the backward of the backward is not defined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftk.adapters.adapter import Adapter, Wanted, flat_adapter
from peftk.adapters.dropout import Dropout
from peftk.adapters.flat import flat_grads, flat_tensors, flat_wanted
from peftk.adapters.table import AdapterTable
from peftk.ops import dispatch
from peftk.ops.saved import Reads, save, save_one, saved, saved_one


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> Tensor:
    if torch.is_grad_enabled() and _wants_grad(x, bias, *(() if adapter is None else adapter.tensors())):
        lora_A, lora_B, _, _, bias_A, bias_B = flat_adapter(adapter)
        tensors = (lora_A, lora_B, bias_A, bias_B)
        y: Tensor = _LoraLinear.apply(x, weight, bias, adapter, dropout, backend, *tensors)
        return y
    return dispatch.lora_linear(x, weight, bias, adapter, dropout=dropout, backend=backend)[0]


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> Tensor:
    if torch.is_grad_enabled():
        tensors = flat_tensors(table.adapters)
        if _wants_grad(x, bias, *tensors):
            y: Tensor = _MultiLoraLinear.apply(x, weight, bias, table, ids, dropout, backend, *tensors)
            return y
    return dispatch.multi_lora_linear(x, weight, bias, table, ids, dropout=dropout, backend=backend)[0]


_TWICE = (
    "backward: expected one that nobody differentiates, got one with create_graph; the transforms of torch.func "
    "compute second derivatives (torch.func.hessian, jvp of grad, …)"
)


class _Final(torch.autograd.Function):
    """Gradients as they are, that depend on `sources` in a way nobody can differentiate: an error for who tries."""

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor | None], *sources: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(grad.clone() if grad is not None and grad._is_view() else grad for grad in grads)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(_TWICE)


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """As torch's, but whoever differentiates a gradient gets an error even where unused ones are allowed.

    (torch's gradients hang on nothing, so that `torch.autograd.functional.jvp` and `hvp` take their zeros for answers.)

    ctx.unseen: whether gradients depend on an x that was not saved. ctx.biases: on these, besides what was saved.
    """

    @functools.wraps(backward)
    def once(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = backward(ctx, dy)
        if not torch.is_grad_enabled():
            return grads
        if ctx.unseen:
            raise RuntimeError(_TWICE)
        sources = (dy, *ctx.saved_tensors, *ctx.biases)
        return _Final.apply(grads, *(t for t in sources if t is not None and t.requires_grad))

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
        adapter: Adapter | None,
        dropout: Dropout | None,
        backend: str | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        """tensors: the adapter's lora_A, lora_B, bias_A and bias_B, as torch is to see them."""
        needs = ctx.needs_input_grad
        wanted = Wanted(*needs[6:])
        reads = Reads.of((adapter,), (wanted,), needs[0])
        y, z = dispatch.lora_linear(x, weight, bias, adapter, dropout=dropout, backend=backend, save_z=reads.z)
        save_one(ctx, reads, x, weight, adapter, z, dropout=dropout, wanted=wanted)
        ctx.unseen, ctx.biases = reads.z and needs[0] and not reads.x, tensors[2:3]
        ctx.rest = (None if bias is None else bias.dtype, wanted, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, z, dropout, _), adapter = saved_one(ctx)
        bias_dtype, wanted, backend = ctx.rest
        needs = ctx.needs_input_grad
        dx, grads = dispatch.lora_linear_backward(
            dy, x, weight, adapter, z, dropout=dropout, need_dx=needs[0], wanted=wanted, backend=backend
        )
        dbias = dispatch.bias_grad(dy, bias_dtype) if needs[2] else None
        return dx, None, dbias, None, None, None, *grads


class _MultiLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        table: AdapterTable,
        ids: Tensor,
        dropout: Dropout | None,
        backend: str | None,
        *tensors: Tensor,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        wanted = flat_wanted(table.adapters, needs[7:])
        reads = Reads.of(table.adapters, wanted, needs[0])
        y, z = dispatch.multi_lora_linear(x, weight, bias, table, ids, dropout=dropout, backend=backend, save_z=reads.z)
        # the kernels find the adapters by the table; they are saved so that autograd notices where one changes in place
        pages = factors(table.adapters) if reads.factors else ()
        save(ctx, reads, x, weight, z, ids.clone() if ids.is_inference() else ids, *pages, dropout=dropout)
        ctx.unseen, ctx.biases = (
            reads.z and needs[0] and not reads.x,
            [a.bias_A for a in table.adapters if a is not None],
        )
        ctx.rest = (None if bias is None else bias.dtype, table, wanted, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, z, dropout, (ids, *_) = saved(ctx)
        bias_dtype, table, wanted, backend = ctx.rest
        needs = ctx.needs_input_grad
        assert ids is not None
        dx, grads = dispatch.multi_lora_linear_backward(
            dy, x, weight, table, ids, z, dropout=dropout, need_dx=needs[0], wanted=wanted, backend=backend
        )
        dbias = dispatch.bias_grad(dy, bias_dtype) if needs[2] else None
        return dx, None, dbias, None, None, None, None, *flat_grads(table.adapters, grads)


def factors(adapters: tuple[Adapter | None, ...]) -> list[Tensor]:
    """All adapters' pages of A and B: `flat_tensors` without the biases."""
    return [page for adapter in adapters if adapter is not None for page in adapter.pages_A + adapter.pages_B]
