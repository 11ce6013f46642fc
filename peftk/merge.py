"""Merging and exact unmerging, after the checks of `peftk.functional`. Arithmetic: `peftk.reference.merge`."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from peftk import backends
from peftk.backends.merge_args import NotFiniteError
from peftk.receipt import MergeReceipt
from peftk.reference.merge import Factors

__all__ = ["MergeReceipt", "merge_", "merge_layers_", "remerge_", "unmerge_", "unmerge_layers_"]


def merge_(weight: Tensor, factors: Factors, backend: str | None) -> MergeReceipt:
    with torch.no_grad():
        return _server("merge", weight, factors, backend).merge_(weight.detach(), factors)


def unmerge_(weight: Tensor, receipt: MergeReceipt, backend: str | None) -> None:
    server = _server("unmerge", weight, receipt.factors, backend)
    with torch.no_grad():
        _left_by_the_merge(weight, receipt, server)
        server.unmerge_(weight.detach(), receipt)


def remerge_(weight: Tensor, receipt: MergeReceipt, factors: Factors, backend: str | None) -> MergeReceipt:
    server = _server("merge", weight, factors, backend)
    with torch.no_grad():
        _left_by_the_merge(weight, receipt, server)
        return server.remerge_(weight.detach(), receipt, factors)


def merge_layers_(weights: Sequence[Tensor], factors: Sequence[Factors], backend: str | None) -> list[MergeReceipt]:
    """All or nothing: where one is refused, those merged before it are unmerged."""
    weights = [weight.detach() for weight in weights]
    receipts: dict[int, MergeReceipt] = {}
    groups = _groups("merge", weights, factors, backend)
    with torch.no_grad():
        try:
            for server, layers in groups:
                _merge_group(server, layers, weights, factors, receipts)
        except BaseException:
            for server, layers in groups:
                for layer in receipts.keys() & set(layers):
                    server.unmerge_(weights[layer], receipts[layer])
            raise
    return [receipts[layer] for layer in range(len(weights))]


def _merge_group(
    server: ModuleType,
    layers: Sequence[int],
    weights: Sequence[Tensor],
    factors: Sequence[Factors],
    receipts: dict[int, MergeReceipt],
) -> None:
    """Merges these layers and notes their receipts, each as soon as its layer is merged."""
    together = hasattr(server, "merge_layers_")
    for some in [layers] if together else [[layer] for layer in layers]:
        try:
            if together:
                merged = server.merge_layers_([weights[layer] for layer in some], [factors[layer] for layer in some])
            else:
                merged = [server.merge_(weights[layer], factors[layer]) for layer in some]
        except NotFiniteError as error:
            raise ValueError(f"layer {some[error.layer]}: {error}") from None
        receipts.update(zip(some, merged, strict=True))


def unmerge_layers_(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt], backend: str | None) -> None:
    """All are looked at before the first changes. Where one fails then, those before it are merged again."""
    weights = [weight.detach() for weight in weights]
    groups = _groups("unmerge", weights, [receipt.factors for receipt in receipts], backend)
    unmerged: list[tuple[ModuleType, int]] = []
    with torch.no_grad():
        for server, layers in groups:
            _all_left_by_the_merge(weights, receipts, layers, server)
        try:
            for server, layers in groups:
                if hasattr(server, "unmerge_layers_"):
                    server.unmerge_layers_([weights[i] for i in layers], [receipts[i] for i in layers])
                    unmerged += [(server, layer) for layer in layers]
                else:
                    for layer in layers:
                        server.unmerge_(weights[layer], receipts[layer])
                        unmerged.append((server, layer))
        except BaseException:
            for server, layer in unmerged:
                server.merge_(weights[layer], receipts[layer].factors)
            raise


_TOGETHER = 2**30  # weights


def _groups(
    op: str, weights: Sequence[Tensor], factors: Sequence[Factors], backend: str | None
) -> list[tuple[ModuleType, list[int]]]:
    """Layers that one call of a backend may take together: of one device, one dtype, and one of the adapters.

    Kernels count the weights that they keep raw in int32, so layers stay together for about 2³⁰ weights.
    """
    groups: dict[tuple[object, ...], tuple[ModuleType, list[int]]] = {}
    counts: collections.Counter[tuple[object, ...]] = collections.Counter()
    for layer, (weight, side) in enumerate(zip(weights, factors, strict=True)):
        server = _server(op, weight, side, backend)
        kind = (server.__name__, weight.device, weight.dtype, side.lora_A.dtype)
        counts[kind] += weight.numel()
        key = (*kind, counts[kind] // _TOGETHER)
        groups.setdefault(key, (server, []))[1].append(layer)
    return list(groups.values())


def _all_left_by_the_merge(
    weights: Sequence[Tensor], receipts: Sequence[MergeReceipt], layers: Sequence[int], server: ModuleType
) -> None:
    for layer in layers:
        try:
            _fits(weights[layer], receipts[layer])
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from None
    if hasattr(server, "checksums"):
        sums = server.checksums([weights[layer] for layer in layers])
    else:
        sums = [server.checksum(weights[layer]) for layer in layers]
    for layer, found in zip(layers, sums, strict=True):
        if found != receipts[layer].checksum:
            raise ValueError(f"layer {layer}: {_CHANGED}")


_CHANGED = "weight: expected the bits that the merge left, got others; it was changed since, or is another"


def _left_by_the_merge(weight: Tensor, receipt: MergeReceipt, server: ModuleType) -> None:
    _fits(weight, receipt)
    if server.checksum(weight.detach()) != receipt.checksum:
        raise ValueError(_CHANGED)


def _fits(weight: Tensor, receipt: MergeReceipt) -> None:
    if weight.shape != receipt.code.shape:
        raise ValueError(f"weight: expected shape {list(receipt.code.shape)} of the merge, got {list(weight.shape)}")
    if weight.dtype != receipt.dtype:
        raise ValueError(f"weight: expected dtype {receipt.dtype} of the merge, got {weight.dtype}")
    if weight.device != receipt.code.device:
        raise ValueError(f"weight: expected on {receipt.code.device} like the receipt, got {weight.device}")


def _server(op: str, weight: Tensor, factors: Factors, backend: str | None) -> ModuleType:
    N, K = weight.shape
    dtype, adapters = factors.lora_A.dtype, len(factors.ends)
    call = backends.Call(op, weight.device.type, weight.dtype, weight.dtype, dtype, N, K, N, factors.ends[-1], adapters)
    return backends.module(backends.choose(call, backend).backend)
