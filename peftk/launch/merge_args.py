"""What the merges of the backends share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# as in csrc/common/dtype.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class LayerError(ValueError):
    """What is wrong with a layer; layer: which of those of the call. All are as they were."""

    def __init__(self, message: str, layer: int) -> None:
        super().__init__(message)
        self.layer = layer


class NotFiniteError(LayerError):
    """W + ΔW would not be finite."""

    def __init__(self, layer: int = 0) -> None:
        message = "weight: expected W + s·BA to be finite in every element, got inf or NaN; W is unchanged"
        super().__init__(message, layer)


def rows(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, else a copy."""
    return x if x.stride()[1] == 1 else x.contiguous()


def write(weight: Tensor, values: Tensor) -> None:
    """weight ← values, also where it was made in torch.inference_mode(), outside of which torch refuses to."""
    with torch.inference_mode(weight.is_inference()):
        weight.copy_(values)


@contextlib.contextmanager
def in_rows(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Each W itself where its rows are contiguous, else a copy that is put back unless an exception comes."""
    rows_of = [rows(weight) for weight in weights]
    yield rows_of
    for weight, W in zip(weights, rows_of, strict=True):
        if W is not weight:
            write(weight, W)
        elif not weight.is_inference():
            torch.autograd.graph.increment_version(weight)  # as any change in place: a graph that saved W must notice
