"""What the merges of all backends share: errors, dtype codes, and weights with contiguous rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# as in csrc/common/dtype.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class LayerError(ValueError):
    """A layer of a merge is bad; no layer has changed. layer: its index in the call."""

    def __init__(self, message: str, layer: int) -> None:
        super().__init__(message)
        self.layer = layer


class NotFiniteError(LayerError):
    """W + ΔW would not be finite."""

    def __init__(self, layer: int = 0) -> None:
        message = "weight: expected W + s·BA to be finite in every element, got inf or NaN; W is unchanged"
        super().__init__(message, layer)


def rows(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous, else a copy."""
    return x if x.stride()[1] == 1 else x.contiguous()


def write(weight: Tensor, values: Tensor) -> None:
    """weight ← values. Also for an inference tensor, which torch refuses to change outside of inference mode."""
    with torch.inference_mode(weight.is_inference()):
        weight.copy_(values)


@contextlib.contextmanager
def in_rows(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Each W itself if its rows are contiguous, else a copy, which is written back unless an exception is raised."""
    rows_of = [rows(weight) for weight in weights]
    yield rows_of
    for weight, W in zip(weights, rows_of, strict=True):
        if W is not weight:
            write(weight, W)
        elif not weight.is_inference():
            torch.autograd.graph.increment_version(weight)  # a change in place: graphs that saved W must notice
