"""The operations as registered custom ops, for torch.compile, torch.export and anything else that records operations.

Eager calls do not come here: torch's dispatcher costs more than a small linear layer. A custom op returns only tensors,
so an absent z or gradient is an empty tensor. It takes only flat lists, so a table of adapters is packed into a list of
tensors, a list of integers (per adapter: number of pages or -1 for an empty slot, activation, has bias_A, has bias_B),
a list of scalings, and the first columns of the slices of packed outputs. No call builds a table: those of such lists
are kept (`kept_tables`), and a bank that only serves is named by its number (`handles`), so that its graph follows it.

torch caches compiled backwards on disk, under a key made from the forward only. If you change the arguments of a
backward op, rename its forward op too. Otherwise a cached backward calls the new op with the old arguments.

Ops that no gradient passes (`_op_without_gradients`) are what a compiled model runs in inference. They take the direct
way to a kernel that eager calls take, and return y alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftk.adapters import checks, handles, kept_tables, route, table
from peftk.adapters.adapter import PAGE, Wanted, adapter_of, flat_adapter
from peftk.adapters.dropout import dropout_from, flat_dropout
from peftk.adapters.flat import flat_grads, flat_wanted, unpack
from peftk.adapters.table import AdapterTable
from peftk.ops import dispatch
from peftk.ops.saved import Reads, load_saved, load_with_adapter, save, save_with_adapter
from peftk.reference.lora_linear import accumulate_dtype, reads_z

_LIBRARY = torch.library.Library("peftk", "FRAGMENT")


def _op_without_gradients(function: Callable[..., Tensor]) -> torch._ops.OpOverload:
    """The op `peftk::NAME` that runs `function`.

    `torch.library.custom_op` puts a Python function for autograd and a check of the result around it, which cost more
    than a small linear layer. These ops are called where nothing requires a gradient, and return new tensors.
    """
    name, schema = function.__name__, torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    op: torch._ops.OpOverload = operator.attrgetter(f"{name}.default")(torch.ops.peftk)
    return op


@torch.library.custom_op("peftk::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Returns y [..., N] and z [M, R]; z is empty without an adapter of rank 1 or more."""
    checks.for_kernels(
        x=x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B, bias_A=bias_A, bias_B=bias_B, seed=seed
    )
    adapter = adapter_of(lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)
    dropout = dropout_from(dropout_p, seed)
    y, z = dispatch.lora_linear(x, weight, bias, adapter, dropout=dropout, backend=backend, save_z=True)
    return y, x.new_empty(0) if z is None else z.contiguous()


@lora_linear.register_fake
def _(x, weight, bias, lora_A, lora_B, scaling, activation, bias_A, bias_B, dropout_p, seed, backend):  # type: ignore[no-untyped-def]
    y = _y(x, weight)
    if lora_A is None:
        return y, x.new_empty(0)
    rows = x.numel() // x.shape[-1]
    return y, x.new_empty((rows, lora_A.shape[0]), dtype=accumulate_dtype(x, weight, lora_A))


@_op_without_gradients
def lora_linear_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Returns y [..., N]. It has no gradients."""
    if seed is None and backend is None:
        y = dispatch.direct_lora_linear(
            x, weight, bias, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B
        )
        if y is not None:
            return y
    checks.for_kernels(
        x=x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B, bias_A=bias_A, bias_B=bias_B, seed=seed
    )
    adapter = adapter_of(lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)
    return dispatch.lora_linear(x, weight, bias, adapter, dropout=dropout_from(dropout_p, seed), backend=backend)[0]


@torch.library.register_fake(lora_linear_forward, lib=_LIBRARY)
def _(x, weight, *others):  # type: ignore[no-untyped-def]
    return _y(x, weight)


@torch.library.custom_op("peftk::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
    z: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, lora_A, lora_B, bias_A and bias_B. `needs`: which to compute; the others are empty."""
    adapter = adapter_of(lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)
    dropout = dropout_from(dropout_p, seed)
    wanted = Wanted(*needs[1:])
    z_saved = z if reads_z(adapter, wanted, needs[0]) else None
    dx, grads = dispatch.lora_linear_backward(
        dy, x, weight, adapter, z_saved, dropout=dropout, backend=backend, need_dx=needs[0], wanted=wanted
    )
    dx, dA, dB, da, db = (dy.new_empty(0) if g is None else g for g in (dx, *grads))
    return dx, dA, dB, da, db


@lora_linear_backward.register_fake
def _(dy, x, weight, lora_A, lora_B, scaling, activation, bias_A, bias_B, z, dropout_p, seed, backend, needs):  # type: ignore[no-untyped-def]
    tensors = (_dx(dy, weight), lora_A, lora_B, bias_A, bias_B)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else dy.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )


def _y(x: Tensor, weight: Tensor | None) -> Tensor:
    """An empty tensor of y's shape [..., N]; without a weight, N = K."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] if weight is None else weight.shape[0]))


def _dx(dy: Tensor, weight: Tensor | None) -> Tensor:
    """An empty tensor of dX's shape [..., K]; without a weight, K = N."""
    return dy.new_empty((*dy.shape[:-1], dy.shape[-1] if weight is None else weight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, lora_A, lora_B, scaling, activation, bias_A, bias_B, dropout_p, seed, backend = inputs
    adapter = adapter_of(lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B)
    needs = [ctx.needs_input_grad[i] for i in (0, 3, 4, 7, 8)]
    wanted = Wanted(*needs[1:])
    reads = Reads.of((adapter,), (wanted,), needs[0])
    save_with_adapter(ctx, reads, x, weight, adapter, output[1], dropout=dropout_from(dropout_p, seed), wanted=wanted)
    ctx.rest = (None if bias is None else bias.dtype, needs, backend)


def _backward(ctx: Any, dy: Tensor, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    (x, weight, z, dropout, _), adapter = load_with_adapter(ctx)
    bias_dtype, needs, backend = ctx.rest
    z = dy.new_empty(0) if z is None else z
    grads = lora_linear_backward(dy, x, weight, *flat_adapter(adapter), z, *flat_dropout(dropout), backend, needs)
    dx, dA, dB, da, db = (g if need else None for g, need in zip(grads, needs, strict=True))
    dbias = dispatch.bias_grad(dy, bias_dtype) if ctx.needs_input_grad[2] else None
    return dx, None, dbias, dA, dB, None, None, da, db, None, None, None


lora_linear.register_autograd(_backward, setup_context=_setup_context)


def _table(
    x: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    scalings: Sequence[float],
    columns: Sequence[int],
) -> AdapterTable:
    dtype = tensors[0].dtype if tensors else x.dtype
    return kept_tables.find(tensors, layout, scalings, columns, dtype=dtype, device=x.device)


@torch.library.custom_op("peftk::multi_lora_linear", mutates_args=())
def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    scalings: Sequence[float],
    columns: Sequence[int],
    ids: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Returns y [..., N] and z [M, table.z_width]."""
    checks.for_kernels(x=x, weight=weight, bias=bias, ids=ids, seed=seed)
    adapters, dropout = _table(x, tensors, layout, scalings, columns), dropout_from(dropout_p, seed)
    checks.bank(adapters.adapters, columns, x.shape[-1] if weight is None else weight.shape[0], x.shape[-1])
    y, z = dispatch.multi_lora_linear(x, weight, bias, adapters, ids, dropout=dropout, backend=backend, save_z=True)
    return y, x.new_empty(0) if z is None else z.contiguous()


@multi_lora_linear.register_fake
def _(x, weight, bias, tensors, layout, scalings, columns, ids, dropout_p, seed, backend):  # type: ignore[no-untyped-def]
    y = _y(x, weight)
    adapters = unpack(tensors, layout, scalings)
    width = table.z_pages(adapters, max(len(columns) - 1, 1))[-1] * PAGE
    return y, x.new_empty((ids.shape[0], width), dtype=accumulate_dtype(x, weight, *tensors))


@torch.library.custom_op("peftk::multi_lora_linear_backward", mutates_args=())
def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    scalings: Sequence[float],
    columns: Sequence[int],
    ids: Tensor,
    z: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradient of x, then those of `tensors`. `needs`: which to compute; the others are empty."""
    adapters, dropout = _table(dy, tensors, layout, scalings, columns), dropout_from(dropout_p, seed)
    wanted = flat_wanted(adapters.adapters, needs[1:])
    z_saved = z if Reads.of(adapters.adapters, wanted, needs[0]).z else None
    dx, grads = dispatch.multi_lora_linear_backward(
        dy, x, weight, adapters, ids, z_saved, dropout=dropout, backend=backend, need_dx=needs[0], wanted=wanted
    )
    flat = [dx, *flat_grads(adapters.adapters, grads)]
    # outputs of a custom op must not share memory
    return [
        dy.new_empty(0) if g is None or not need else g.contiguous().clone() if g._is_view() else g
        for g, need in zip(flat, needs, strict=True)
    ]


@multi_lora_linear_backward.register_fake
def _(dy, x, weight, tensors, layout, scalings, columns, ids, z, dropout_p, seed, backend, needs):  # type: ignore[no-untyped-def]
    like = (_dx(dy, weight), *tensors)
    return [t.new_empty(t.shape) if need else dy.new_empty(0) for t, need in zip(like, needs, strict=True)]


def _multi_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, tensors, layout, scalings, columns, ids, dropout_p, seed, backend = inputs
    # needs_input_grad has a single entry for the whole list of tensors
    needs = [ctx.needs_input_grad[0], *(t.requires_grad for t in tensors)]
    adapters = unpack(tensors, layout, scalings)
    reads = Reads.of(adapters, flat_wanted(adapters, needs[1:]), needs[0])
    save(ctx, reads, x, weight, output[1], ids, *tensors, dropout=dropout_from(dropout_p, seed))
    ctx.rest = (None if bias is None else bias.dtype, needs, (layout, scalings, columns), backend)


def _multi_backward(ctx: Any, dy: Tensor, dz: Tensor | None) -> tuple[Any, ...]:
    x, weight, z, dropout, (ids, *tensors) = load_saved(ctx)
    bias_dtype, needs, numbers, backend = ctx.rest
    z = dy.new_empty(0) if z is None else z
    grads = multi_lora_linear_backward(dy, x, weight, tensors, *numbers, ids, z, *flat_dropout(dropout), backend, needs)
    dx, *grads = (g if need else None for g, need in zip(grads, needs, strict=True))
    dbias = dispatch.bias_grad(dy, bias_dtype) if ctx.needs_input_grad[2] else None
    # torch takes an empty list of numbers for a list of tensors, whose gradient is a list too
    plain: list[list[None] | None] = [None if values else [] for values in numbers]
    return dx, None, dbias, grads, *plain, None, None, None, None


multi_lora_linear.register_autograd(_multi_backward, setup_context=_multi_setup_context)


@_op_without_gradients
def bank_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bank: int,
    ids: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> Tensor:
    """y [..., N] with the adapters that a bank has when this runs, by its number. It has no gradients.

    ids: slots, as `peftk.functional.multi_lora_linear` takes them.
    """
    found = handles.bank(bank)
    checks.same_device("bank", found, x.device, "x")
    if found.shape != (x.shape[-1] if weight is None else weight.shape[0], x.shape[-1]):
        checks.bank(found.adapters, found.columns, x.shape[-1] if weight is None else weight.shape[0], x.shape[-1])
    adapters = found.table()
    assert adapters is not None  # all adapters are the bank's own
    if weight is not None and seed is None and backend is None:
        y = dispatch.direct_multi_lora_linear(x, weight, bias, adapters, ids)
        if y is not None:
            return y
    checks.for_kernels(x=x, weight=weight, bias=bias, ids=ids, seed=seed)
    routed = route.flat(ids)
    flat, dropout = route.flat_ids(ids, x) if routed is None else routed, dropout_from(dropout_p, seed)
    return dispatch.multi_lora_linear(x, weight, bias, adapters, flat, dropout=dropout, backend=backend)[0]


@torch.library.register_fake(bank_lora_linear, lib=_LIBRARY)
def _(x, weight, bias, bank, ids, dropout_p, seed, backend):  # type: ignore[no-untyped-def]
    return _y(x, weight)


@_op_without_gradients
def slots_of(ids: Tensor, bank: int) -> Tensor:
    """`AdapterBank.slots_of` for the numbers that the bank's adapters have when this runs."""
    checks.for_kernels(ids=ids)
    slots = handles.bank(bank).slots_of(ids)
    return slots.clone() if slots is ids else slots


@torch.library.register_fake(slots_of, lib=_LIBRARY)
def _(ids, bank):  # type: ignore[no-untyped-def]
    return torch.empty_like(ids)


__all__ = ["bank_lora_linear", "lora_linear", "lora_linear_forward", "multi_lora_linear", "slots_of"]
