"""What a forward saves for its backward, for eager Functions and for custom ops: only what the backward reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from peftk.adapters.adapter import Adapter, Wanted, adapter_of, flat_adapter
from peftk.adapters.dropout import Dropout, dropout_from, flat_dropout
from peftk.reference.lora_linear import reads_z


class Reads(NamedTuple):
    """What a backward reads from the forward, besides dY.

    dA reads x, dX reads W; `peftk.reference.lora_linear.reads_z` says when z is read. dX, dA and da read A and B. They
    are saved for dB too, although it does not read them: that costs no memory, and a change of the adapter before the
    backward is then detected. No gradient reads a bias.
    """

    x: bool
    weight: bool
    factors: bool
    z: bool

    @classmethod
    def of(cls, adapters: Sequence[Adapter | None], wanted: Sequence[Wanted], need_dx: bool) -> Reads:
        """wanted: for each adapter, in the order of `adapters`. need_dx: whether dX is computed."""
        x = z = factors = False
        for adapter, wants in zip(adapters, wanted, strict=True):
            x = x or wants.lora_A
            z = z or reads_z(adapter, wants, need_dx)
            factors = factors or wants.lora_A or wants.lora_B or wants.bias_A
        return cls(x, need_dx, factors or need_dx, z)


class Saved(NamedTuple):
    """x and z are None if the backward does not read them. weight is always there: its shape is read anyway."""

    x: Tensor | None
    weight: Tensor | None
    z: Tensor | None
    dropout: Dropout | None
    others: list[Tensor | None]


def save(
    ctx: Any,
    reads: Reads,
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    *others: Tensor | None,
    dropout: Dropout | None,
) -> None:
    p, seed = flat_dropout(dropout)
    kept = (x if reads.x else None, weight if reads.weight else None, z if reads.z else None, seed)
    ctx.save_for_backward(*kept, *others)
    ctx.weight, ctx.dropout_p = weight, p


def load_saved(ctx: Any) -> Saved:
    x, weight, z, seed, *others = ctx.saved_tensors
    return Saved(x, ctx.weight if weight is None else weight, z, dropout_from(ctx.dropout_p, seed), others)


def save_with_adapter(
    ctx: Any,
    reads: Reads,
    x: Tensor,
    weight: Tensor | None,
    adapter: Adapter | None,
    z: Tensor | None,
    *,
    dropout: Dropout | None,
    wanted: Wanted,
) -> None:
    """`save` with an adapter. Its biases are kept on ctx: the backward reads only their shapes and dtypes."""
    lora_A, lora_B, scaling, activation, bias_A, bias_B = flat_adapter(adapter)
    factors = (lora_A, lora_B) if reads.factors else (None, None)
    save(ctx, reads, x, weight, z, *factors, dropout=dropout)
    biases = {"bias_A": bias_A if wanted.bias_A else None, "bias_B": bias_B if wanted.bias_B else None}
    ctx.adapter = scaling, {"activation": activation, **biases}


def load_with_adapter(ctx: Any) -> tuple[Saved, Adapter | None]:
    """What `save_with_adapter` saved. The adapter has no A and B if the backward does not read them."""
    saved = load_saved(ctx)
    lora_A, lora_B = saved.others
    scaling, rest = ctx.adapter
    return saved, adapter_of(lora_A, lora_B, scaling, **rest)
