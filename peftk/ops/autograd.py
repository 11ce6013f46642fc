"""Gradients in eager mode: torch.autograd Functions that call the backend directly.

They save what the gradients that are asked for read, and no more (`Reads`): nothing of the size of [M, N], no mask, and
of W, A and B no copies. Saved tensors that somebody changes in place before the backward make it raise, as in torch.
What a Function returns is no view and nobody else's memory, so it may be changed in place. W is frozen, so it has no
gradient; the backward of the backward is not defined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftk.adapters.adapter import Adapter, Wanted, adapter_of
from peftk.adapters.flat import flat_grads, flat_tensors, flat_wanted
from peftk.adapters.table import AdapterTable
from peftk.ops import dispatch
from peftk.reference.lora_linear import reads_z


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
    adapter = adapter_of(lora_A, lora_B, bias_A, bias_B, scaling, activation)
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


class Reads(NamedTuple):
    """What a backward reads of the forward, besides dY.

    x is read for dA, W for dX, z where `peftk.reference.reads_z` says so. A and B are read for dX, dA and da; they
    count for dB too, which saves nothing to leave them out, and whoever changes an adapter that waits for its backward
    will have meant to change it after. No gradient reads a bias.
    """

    x: bool
    weight: bool
    factors: bool
    z: bool

    @classmethod
    def of(cls, adapters: Sequence[Adapter | None], wanted: Sequence[Wanted], need_dx: bool) -> Reads:
        """wanted: of each adapter, in this order."""
        x = z = factors = False
        for adapter, wants in zip(adapters, wanted, strict=True):
            x = x or wants.lora_A
            z = z or reads_z(adapter, wants, need_dx)
            factors = factors or wants.lora_A or wants.lora_B or wants.bias_A
        return cls(x, need_dx, factors or need_dx, z)


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
        adapter = adapter_of(lora_A, lora_B, bias_A, bias_B, scaling, activation)
        needs = ctx.needs_input_grad
        wanted = Wanted(*needs[3:7])
        reads = Reads.of((adapter,), (wanted,), needs[0])
        y, z = dispatch.lora_linear(x, weight, bias, adapter, dropout_p, seed, backend, reads.z)
        ctx.save_for_backward(
            x if reads.x else None,
            weight if reads.weight else None,
            lora_A if reads.factors else None,
            lora_B if reads.factors else None,
            seed,
            z,
        )
        # of these a backward reads shapes and dtypes
        ctx.shapes = (weight, bias_A if needs[5] else None, bias_B if needs[6] else None)
        ctx.unseen, ctx.biases = reads.z and needs[0] and not reads.x, (bias_A,)
        ctx.rest = (None if bias is None else bias.dtype, wanted, scaling, activation, dropout_p, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, saved_weight, lora_A, lora_B, seed, z = ctx.saved_tensors
        weight, bias_A, bias_B = ctx.shapes
        bias_dtype, wanted, scaling, activation, dropout_p, backend = ctx.rest
        weight, needs = weight if saved_weight is None else saved_weight, ctx.needs_input_grad
        adapter = adapter_of(lora_A, lora_B, bias_A, bias_B, scaling, activation)
        dx, grads = dispatch.lora_linear_backward(dy, x, weight, adapter, z, dropout_p, seed, backend, needs[0], wanted)
        dbias = dispatch.bias_grad(dy, bias_dtype) if needs[2] else None
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
        needs = ctx.needs_input_grad
        wanted = flat_wanted(table.adapters, needs[8:])
        reads = Reads.of(table.adapters, wanted, needs[0])
        y, z = dispatch.multi_lora_linear(x, weight, bias, table, ids, dropout_p, seed, backend, reads.z)
        # the kernels find the adapters by the table; they are saved so that autograd notices where one changes in place
        ctx.save_for_backward(
            x if reads.x else None,
            weight if reads.weight else None,
            ids.clone() if ids.is_inference() else ids,
            seed,
            z,
            *(factors(table.adapters) if reads.factors else ()),
        )
        ctx.unseen, ctx.biases = (
            reads.z and needs[0] and not reads.x,
            [a.bias_A for a in table.adapters if a is not None],
        )
        ctx.rest = (weight, None if bias is None else bias.dtype, table, wanted, dropout_p, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, saved_weight, ids, seed, z = ctx.saved_tensors[:5]
        weight, bias_dtype, table, wanted, dropout_p, backend = ctx.rest
        weight, needs = weight if saved_weight is None else saved_weight, ctx.needs_input_grad
        dx, grads = dispatch.multi_lora_linear_backward(
            dy, x, weight, table, ids, z, dropout_p, seed, backend, needs[0], wanted
        )
        dbias = dispatch.bias_grad(dy, bias_dtype) if needs[2] else None
        return dx, None, dbias, None, None, None, None, None, *flat_grads(table.adapters, grads)


def factors(adapters: tuple[Adapter | None, ...]) -> list[Tensor]:
    """All adapters' pages of A and B: `flat_tensors` without the biases."""
    return [page for adapter in adapters if adapter is not None for page in adapter.pages_A + adapter.pages_B]
