"""What the merges of the backends share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftk.receipt import MergeReceipt
from peftk.reference.merge import RAW, Factors

# as in csrc/common/dtype.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class NotFiniteError(ValueError):
    """W + ΔW would not be finite; W is as it was. layer: which of those that were to be merged."""

    def __init__(self, layer: int = 0) -> None:
        super().__init__("weight: expected W + s·BA to be finite in every element, got inf or NaN; W is unchanged")
        self.layer = layer


def rows(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, else a copy."""
    return x if x.stride()[1] == 1 else x.contiguous()


@contextlib.contextmanager
def in_rows(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Each W itself where its rows are contiguous, else a copy that is put back unless an exception comes."""
    held = [rows(weight) for weight in weights]
    yield held
    for weight, W in zip(weights, held, strict=True):
        if W is not weight:
            weight.copy_(W)
        elif not weight.is_inference():
            torch.autograd.graph.increment_version(weight)  # as any change in place: a graph that saved W must notice


class OutOfPlace(NamedTuple):
    """merge_, unmerge_ and remerge_ of a backend that computes into new tensors: W is written last."""

    merge: Callable[[Tensor, Factors], tuple[Tensor, Tensor]]
    unmerge: Callable[[Tensor, Factors, Tensor], Tensor]
    checksum: Callable[[Tensor], int]

    def merge_(self, weight: Tensor, factors: Factors) -> MergeReceipt:
        return self._merge_from(weight, weight, factors)

    def unmerge_(self, weight: Tensor, receipt: MergeReceipt) -> None:
        weight.copy_(self._base(weight, receipt))

    def remerge_(self, weight: Tensor, receipt: MergeReceipt, factors: Factors) -> MergeReceipt:
        return self._merge_from(weight, self._base(weight, receipt), factors)

    def _base(self, weight: Tensor, receipt: MergeReceipt) -> Tensor:
        base = self.unmerge(weight, receipt.factors, receipt.code)
        base.view(-1)[receipt.raw_index] = receipt.raw_values
        return base

    def _merge_from(self, weight: Tensor, base: Tensor, factors: Factors) -> MergeReceipt:
        new, code = self.merge(base, factors)
        if not bool(new.isfinite().all()):
            raise NotFiniteError
        raw_index = (code == RAW).flatten().nonzero().flatten()
        receipt = MergeReceipt(factors, code, raw_index, base.flatten()[raw_index], self.checksum(new))
        weight.copy_(new)
        return receipt
