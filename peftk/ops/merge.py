"""Merging and exact unmerging, after the checks of `peftk.functional`. Arithmetic: `peftk.reference.merge`.

All layers of a call or none of them, whatever is raised and wherever: what is not finite, memory that runs out, or a
Ctrl-C, which waits until the layers at work are whole (`peftk.system.interrupts`).
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import torch
from torch import Tensor

from peftk.backends import choice, registry
from peftk.backends.call import MERGE, UNMERGE, Call, Op
from peftk.backends.contract import Backend, served
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
    """receipts: of what each layer holds, None where it is the base layer's weight."""
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
        for server, layers in groups:
            _left_by_the_merge(server, layers, weights, before)
        with interrupts.deferred() as deferred:
            try:
                for server, layers in groups:
                    deferred.deliver()
                    receipts.update(zip(layers, _merge_group(server, layers, weights, before, factors), strict=True))
                    for layer in layers:
                        receipts[layer] = _smallest(server, weights[layer], receipts[layer])
                deferred.deliver()
                ordered = [receipts[layer] for layer in range(len(weights))]
            except BaseException:
                for server, layers in groups:
                    for layer in receipts.keys() & set(layers):
                        old = before[layer]
                        if old is None:
                            served(server.merge).unmerge_(weights[layer], receipts[layer])
                        else:
                            served(server.merge).remerge_(weights[layer], receipts[layer], old.factors)
                raise
    return ordered


def _merge_group(
    server: Backend,
    layers: Sequence[int],
    weights: Sequence[Tensor],
    before: Sequence[MergeReceipt | None],
    factors: Sequence[Factors],
) -> list[MergeReceipt]:
    first = layers[0]
    old = before[first]
    try:
        if old is not None:
            return [served(server.merge).remerge_(weights[first], old, factors[first])]
        if len(layers) == 1:
            return [served(server.merge).merge_(weights[first], factors[first])]
        return served(server.merge_layers).merge_layers_([weights[i] for i in layers], [factors[i] for i in layers])
    except NotFiniteError as error:
        raise NotFiniteError(layers[error.layer]) from None


def _smallest(server: Backend, weight: Tensor, receipt: MergeReceipt) -> MergeReceipt:
    """The receipt in its smallest form. Where ΔW is many times W, that is no longer two weights per byte."""
    form = smaller_form(receipt)
    if form == "bytes":
        return with_bytes(receipt)
    if form == "weights":
        base = weight.clone(memory_format=torch.contiguous_format)
        served(server.merge).unmerge_(base, receipt)
        return with_weights(receipt, base)
    return receipt


def _unmerge(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt], backend: str | None) -> None:
    """All are looked at before the first changes. Where one fails then, those before it are merged again."""
    weights = [weight.detach() for weight in weights]
    factors = [receipt.factors for receipt in receipts]
    groups = _groups(UNMERGE, weights, factors, [True] * len(weights), backend)
    unmerged: list[tuple[Backend, int]] = []
    with lasting():
        for server, layers in groups:
            _left_by_the_merge(server, layers, weights, receipts)
        with interrupts.deferred() as deferred:
            try:
                for server, layers in groups:
                    deferred.deliver()
                    if len(layers) == 1:
                        served(server.merge).unmerge_(weights[layers[0]], receipts[layers[0]])
                    else:
                        merged = [weights[i] for i in layers]
                        served(server.merge_layers).unmerge_layers_(merged, [receipts[i] for i in layers])
                    unmerged += [(server, layer) for layer in layers]
                deferred.deliver()
            except BaseException:
                for server, layer in unmerged:
                    served(server.merge).merge_(weights[layer], receipts[layer].factors)
                raise


# Weights that one call of a backend may take: kernels that take a list of layers leave a byte per weight before it is
# packed, so this is also the memory that a call takes for a while, 256 MiB. (They count raw weights in int32, too.)
_TOGETHER = 2**28


def _groups(
    op: Op, weights: Sequence[Tensor], factors: Sequence[Factors], together: Sequence[bool], backend: str | None
) -> list[tuple[Backend, list[int]]]:
    """Layers that one call of a backend takes: of one device, one dtype, and one of the adapters; or one layer alone.

    together: whether a layer may be with others.
    """
    groups: dict[tuple[object, ...], tuple[Backend, list[int]]] = {}
    counts: collections.Counter[tuple[object, ...]] = collections.Counter()
    for layer, (weight, side) in enumerate(zip(weights, factors, strict=True)):
        name = choice.choose(_call(op, weight, side), backend).backend
        server = registry.backend(name)
        kind = (name, weight.device, weight.dtype, side.lora_A.dtype)
        counts[kind] += weight.numel()
        key: tuple[object, ...] = (*kind, counts[kind] // _TOGETHER)
        if not together[layer] or server.merge_layers is None:
            key = (layer,)
        groups.setdefault(key, (server, []))[1].append(layer)
    return list(groups.values())


def _left_by_the_merge(
    server: Backend, layers: Sequence[int], weights: Sequence[Tensor], receipts: Sequence[MergeReceipt | None]
) -> None:
    """Raises LayerError where one of these layers is not what the merge of its receipt left."""
    merged = [(layer, receipt) for layer in layers if (receipt := receipts[layer]) is not None]
    for layer, receipt in merged:
        _fits(layer, weights[layer], receipt)
    if server.merge_layers is not None and merged:
        sums = server.merge_layers.checksums([weights[layer] for layer, _ in merged])
    else:
        sums = [served(server.merge).checksum(weights[layer]) for layer, _ in merged]
    for (layer, receipt), found in zip(merged, sums, strict=True):
        if found != receipt.checksum:
            raise LayerError(
                "weight: expected the bits that the merge left, got others; it was changed since, or is another", layer
            )


def _fits(layer: int, weight: Tensor, receipt: MergeReceipt) -> None:
    for name, expected, got in (
        ("shape", list(receipt.shape), list(weight.shape)),
        ("dtype", receipt.dtype, weight.dtype),
    ):
        if got != expected:
            raise LayerError(f"weight: expected {name} {expected} of the merge, got {got}", layer)
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
