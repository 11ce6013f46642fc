"""Merges and exactly unmerges lists of layers. `peftk.functional` checks the arguments; arithmetic: `reference.merge`.

A call changes all of its layers or none, whatever is raised: a result that is not finite, no memory left, or Ctrl-C,
which is delivered between groups of layers (`peftk.system.interrupts`).
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import torch
from torch import Tensor

from peftk.backends import choice, registry
from peftk.backends.call import MERGE, UNMERGE, Call, Op
from peftk.backends.contract import Backend, require
from peftk.launch.merge_args import LayerError, NotFiniteError
from peftk.reference.merge import Factors
from peftk.reference.receipt import MergeReceipt, smaller_form, with_bytes, with_weights
from peftk.system import interrupts
from peftk.system.lasting import lasting

__all__ = [
    "MergeReceipt",
    "merge_",
    "merge_layers_",
    "remerge_",
    "remerge_layers_",
    "unmerge_",
    "unmerge_layers_",
]


def merge_(weight: Tensor, factors: Factors, *, backend: str | None = None) -> MergeReceipt:
    return _merge([weight], [None], [factors], backend)[0]


def unmerge_(weight: Tensor, receipt: MergeReceipt, *, backend: str | None = None) -> None:
    _unmerge([weight], [receipt], backend)


def remerge_(weight: Tensor, receipt: MergeReceipt, factors: Factors, *, backend: str | None = None) -> MergeReceipt:
    return _merge([weight], [receipt], [factors], backend)[0]


def merge_layers_(
    weights: Sequence[Tensor], factors: Sequence[Factors], *, backend: str | None = None
) -> list[MergeReceipt]:
    return remerge_layers_(weights, [None] * len(weights), factors, backend=backend)


def remerge_layers_(
    weights: Sequence[Tensor],
    receipts: Sequence[MergeReceipt | None],
    factors: Sequence[Factors],
    *,
    backend: str | None = None,
) -> list[MergeReceipt]:
    """receipts: of the merge that each weight holds now; None for an unmerged weight."""
    try:
        return _merge(weights, receipts, factors, backend)
    except LayerError as error:
        raise ValueError(f"layer {error.layer}: {error}") from None


def unmerge_layers_(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt], *, backend: str | None = None) -> None:
    try:
        _unmerge(weights, receipts, backend)
    except LayerError as error:
        raise ValueError(f"layer {error.layer}: {error}") from None


def _merge(
    weights: Sequence[Tensor],
    before: Sequence[MergeReceipt | None],
    factors: Sequence[Factors],
    backend: str | None,
) -> list[MergeReceipt]:
    weights = [weight.detach() for weight in weights]
    groups = _groups(MERGE, weights, factors, [receipt is None for receipt in before], backend)
    receipts: dict[int, MergeReceipt] = {}
    with lasting():
        for impl, layers in groups:
            _check_unchanged(impl, layers, weights, before)
        with interrupts.deferred() as deferred:
            try:
                for impl, layers in groups:
                    deferred.deliver()
                    receipts.update(zip(layers, _merge_group(impl, layers, weights, before, factors), strict=True))
                    for layer in layers:
                        receipts[layer] = _compact_receipt(impl, weights[layer], receipts[layer])
                deferred.deliver()
                ordered = [receipts[layer] for layer in range(len(weights))]
            except BaseException:
                for impl, layers in groups:
                    for layer in receipts.keys() & set(layers):
                        old = before[layer]
                        if old is None:
                            require(impl.merge).unmerge_(weights[layer], receipts[layer])
                        else:
                            require(impl.merge).remerge_(weights[layer], receipts[layer], old.factors)
                raise
    return ordered


def _merge_group(
    impl: Backend,
    layers: Sequence[int],
    weights: Sequence[Tensor],
    before: Sequence[MergeReceipt | None],
    factors: Sequence[Factors],
) -> list[MergeReceipt]:
    first = layers[0]
    old = before[first]
    try:
        if old is not None:
            return [require(impl.merge).remerge_(weights[first], old, factors[first])]
        if len(layers) == 1:
            return [require(impl.merge).merge_(weights[first], factors[first])]
        return require(impl.merge_layers).merge_layers_([weights[i] for i in layers], [factors[i] for i in layers])
    except NotFiniteError as error:
        raise NotFiniteError(layers[error.layer]) from None


def _compact_receipt(impl: Backend, weight: Tensor, receipt: MergeReceipt) -> MergeReceipt:
    """The receipt in its smallest form, which is two weights per byte unless ΔW is many times as large as W."""
    form = smaller_form(receipt)
    if form == "bytes":
        return with_bytes(receipt)
    if form == "weights":
        base = weight.clone(memory_format=torch.contiguous_format)
        require(impl.merge).unmerge_(base, receipt)
        return with_weights(receipt, base)
    return receipt


def _unmerge(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt], backend: str | None) -> None:
    """All layers are checked before the first changes. If one fails later, those already unmerged are merged again."""
    weights = [weight.detach() for weight in weights]
    factors = [receipt.factors for receipt in receipts]
    groups = _groups(UNMERGE, weights, factors, [True] * len(weights), backend)
    unmerged: list[tuple[Backend, int]] = []
    with lasting():
        for impl, layers in groups:
            _check_unchanged(impl, layers, weights, receipts)
        with interrupts.deferred() as deferred:
            try:
                for impl, layers in groups:
                    deferred.deliver()
                    done = [(impl, layer) for layer in layers]
                    if len(layers) == 1:
                        require(impl.merge).unmerge_(weights[layers[0]], receipts[layers[0]])
                    else:
                        merged = [weights[i] for i in layers]
                        require(impl.merge_layers).unmerge_layers_(merged, [receipts[i] for i in layers])
                    unmerged += done
                deferred.deliver()
            except BaseException:
                for impl, layer in unmerged:
                    require(impl.merge).merge_(weights[layer], receipts[layer].factors)
                raise


# Kernels that take a list of layers write a byte per weight before packing the code, so this also limits a call's
# temporary memory, to 256 MiB. (They also count raw weights in int32.)
_MAX_WEIGHTS_PER_CALL = 2**28


def _groups(
    op: Op, weights: Sequence[Tensor], factors: Sequence[Factors], groupable: Sequence[bool], backend: str | None
) -> list[tuple[Backend, list[int]]]:
    """Groups of layers for one backend call each: same device, weight dtype and adapter dtype; or one layer alone.

    groupable: for each layer, whether it may share a call with others.
    """
    groups: dict[tuple[object, ...], tuple[Backend, list[int]]] = {}
    counts: collections.Counter[tuple[object, ...]] = collections.Counter()
    for layer, (weight, layer_factors) in enumerate(zip(weights, factors, strict=True)):
        name = choice.choose(_call(op, weight, layer_factors), backend).backend
        impl = registry.backend(name)
        kind = (name, weight.device, weight.dtype, layer_factors.lora_A.dtype)
        counts[kind] += weight.numel()
        key: tuple[object, ...] = (*kind, counts[kind] // _MAX_WEIGHTS_PER_CALL)
        if not groupable[layer] or impl.merge_layers is None:
            key = (layer,)
        groups.setdefault(key, (impl, []))[1].append(layer)
    return list(groups.values())


def _check_unchanged(
    impl: Backend, layers: Sequence[int], weights: Sequence[Tensor], receipts: Sequence[MergeReceipt | None]
) -> None:
    """Raises LayerError if one of these weights has changed since the merge that wrote its receipt."""
    merged = [(layer, receipt) for layer in layers if (receipt := receipts[layer]) is not None]
    for layer, receipt in merged:
        _check_layer(layer, weights[layer], receipt)
    if impl.merge_layers is not None and merged:
        sums = impl.merge_layers.checksums([weights[layer] for layer, _ in merged])
    else:
        sums = [require(impl.merge).checksum(weights[layer]) for layer, _ in merged]
    for (layer, receipt), found in zip(merged, sums, strict=True):
        if found != receipt.checksum:
            raise LayerError(
                "weight: expected the bits that the merge left, got others: changed since, or a different weight",
                layer,
            )


def _check_layer(layer: int, weight: Tensor, receipt: MergeReceipt) -> None:
    for name, expected, got in (
        ("shape", list(receipt.shape), list(weight.shape)),
        ("dtype", receipt.dtype, weight.dtype),
    ):
        if got != expected:
            raise LayerError(f"weight: expected {name} {expected} as in the merge, got {got}", layer)
    if weight.device != receipt.device:
        raise LayerError(f"weight: expected on {receipt.device} like the receipt, got {weight.device}", layer)


def _call(op: Op, weight: Tensor, factors: Factors) -> Call:
    N, K = weight.shape
    return Call(
        op=op,
        device=weight.device.type,
        x_dtype=weight.dtype,
        weight_dtype=weight.dtype,
        adapter_dtype=factors.lora_A.dtype,
        M=N,
        K=K,
        N=N,
        rank=factors.ends[-1],
        adapters=len(factors.ends),
    )
