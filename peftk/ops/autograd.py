"""Gradients in eager mode: torch.autograd Functions that call the backend directly.

Each Function saves only what the requested gradients read (`peftk.ops.saved`): nothing of size [M, N], no dropout mask,
and no copies of W, A or B. As in torch, the backward raises if a saved tensor was changed in place since the forward.
The output is not a view and shares no memory, so it may be changed in place. W is frozen and gets no gradient. Second
derivatives are not supported.
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
from peftk.ops.saved import Reads, load_saved, load_with_adapter, save, save_with_adapter


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> Tensor:
    if torch.is_grad_enabled() and wants_grad(x, bias, *(() if adapter is None else adapter.tensors())):
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
        if wants_grad(x, bias, *tensors):
            y: Tensor = _MultiLoraLinear.apply(x, weight, bias, table, ids, dropout, backend, *tensors)
            return y
    return dispatch.multi_lora_linear(x, weight, bias, table, ids, dropout=dropout, backend=backend)[0]


_SECOND_DERIVATIVE_ERROR = (
    "backward: expected no second derivative, got one (create_graph=True); for second derivatives use the transforms "
    "of torch.func (torch.func.hessian, jvp of grad, …)"
)


class _NotDifferentiable(torch.autograd.Function):
    """Passes gradients through unchanged. They depend on `sources`; differentiating them raises RuntimeError."""

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor | None], *sources: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(grad.clone() if grad is not None and grad._is_view() else grad for grad in grads)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(_SECOND_DERIVATIVE_ERROR)


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Like torch's decorator, but differentiating a gradient raises even where unused inputs are allowed.

    With torch's own, the gradients are connected to nothing, so `torch.autograd.functional.jvp` and `hvp` would return
    zeros instead of raising.

    Reads from ctx: reads_unsaved_x, whether the gradients depend on an x that was not saved; biases, tensors that the
    gradients depend on besides the saved ones.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = backward(ctx, dy)
        if not torch.is_grad_enabled():
            return grads
        if ctx.reads_unsaved_x:
            raise RuntimeError(_SECOND_DERIVATIVE_ERROR)
        sources = (dy, *ctx.saved_tensors, *ctx.biases)
        return _NotDifferentiable.apply(grads, *(t for t in sources if t is not None and t.requires_grad))

    return wrapper


def wants_grad(*tensors: Tensor | None) -> bool:
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
        """tensors: the adapter's lora_A, lora_B, bias_A and bias_B once more, so that torch tracks them as inputs."""
        needs = ctx.needs_input_grad
        wanted = Wanted(*needs[6:])
        reads = Reads.of((adapter,), (wanted,), needs[0])
        y, z = dispatch.lora_linear(x, weight, bias, adapter, dropout=dropout, backend=backend, save_z=reads.z)
        save_with_adapter(ctx, reads, x, weight, adapter, z, dropout=dropout, wanted=wanted)
        ctx.reads_unsaved_x, ctx.biases = reads.z and needs[0] and not reads.x, tensors[2:3]
        ctx.rest = (None if bias is None else bias.dtype, wanted, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, z, dropout, _), adapter = load_with_adapter(ctx)
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
        # the kernels read the adapters through the table; saving them lets autograd detect changes in place
        factor_list = factor_tensors(table.adapters) if reads.factors else ()
        save(ctx, reads, x, weight, z, ids.clone() if ids.is_inference() else ids, *factor_list, dropout=dropout)
        ctx.reads_unsaved_x, ctx.biases = (
            reads.z and needs[0] and not reads.x,
            [a.bias_A for a in table.adapters if a is not None],
        )
        ctx.rest = (None if bias is None else bias.dtype, table, wanted, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, z, dropout, (ids, *_) = load_saved(ctx)
        bias_dtype, table, wanted, backend = ctx.rest
        needs = ctx.needs_input_grad
        assert ids is not None
        dx, grads = dispatch.multi_lora_linear_backward(
            dy, x, weight, table, ids, z, dropout=dropout, need_dx=needs[0], wanted=wanted, backend=backend
        )
        dbias = dispatch.bias_grad(dy, bias_dtype) if needs[2] else None
        return dx, None, dbias, None, None, None, None, *flat_grads(table.adapters, grads)


def factor_tensors(adapters: Sequence[Adapter | None]) -> list[Tensor]:
    """The pages of A and B of all adapters: `flat_tensors` without the biases."""
    return [page for adapter in adapters if adapter is not None for page in adapter.pages_A + adapter.pages_B]
