"""Merging and exact unmerging, after the checks of `peftk.functional`. Arithmetic: `peftk.reference.merge`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from peftk import backends
from peftk.receipt import MergeReceipt
from peftk.reference.merge import Factors

__all__ = ["MergeReceipt", "merge_", "remerge_", "unmerge_"]


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


def _left_by_the_merge(weight: Tensor, receipt: MergeReceipt, server: ModuleType) -> None:
    if weight.shape != receipt.code.shape:
        raise ValueError(f"weight: expected shape {list(receipt.code.shape)} of the merge, got {list(weight.shape)}")
    if weight.dtype != receipt.dtype:
        raise ValueError(f"weight: expected dtype {receipt.dtype} of the merge, got {weight.dtype}")
    if weight.device != receipt.code.device:
        raise ValueError(f"weight: expected on {receipt.code.device} like the receipt, got {weight.device}")
    if server.checksum(weight.detach()) != receipt.checksum:
        raise ValueError(
            "weight: expected the bits that the merge left, got others; it was changed since, or is another"
        )


def _server(op: str, weight: Tensor, factors: Factors, backend: str | None) -> ModuleType:
    N, K = weight.shape
    dtype, adapters = factors.lora_A.dtype, len(factors.ends)
    call = backends.Call(op, weight.device.type, weight.dtype, weight.dtype, dtype, N, K, N, factors.ends[-1], adapters)
    return backends.module(backends.choose(call, backend).backend)
