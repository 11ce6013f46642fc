"""Merging and exact unmerging: what a receipt holds and how it is used. Arithmetic: `peftk.reference.merge`."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from peftk import backends
from peftk.reference.merge import RAW


@dataclasses.dataclass(frozen=True)
class MergeReceipt:
    """Everything that brings W back from W' bit for bit; independent of the tensors that the merge was called with.

    code [N, K] int8 is the distance between W and what plain subtraction gives; the few weights whose distance does
    not fit in it lie in raw_values, at raw_index of the flattened W.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    code: Tensor
    raw_index: Tensor
    raw_values: Tensor
    dtype: torch.dtype
    checksum: int

    @property
    def nbytes(self) -> int:
        """Bytes held, A and B included."""
        return sum(t.nbytes for t in (self.lora_A, self.lora_B, self.code, self.raw_index, self.raw_values))

    def to(self, device: torch.device) -> MergeReceipt:
        """The same receipt with its tensors on another device, for a W that has moved."""
        names = ("lora_A", "lora_B", "code", "raw_index", "raw_values")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})


def merge_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str | None) -> MergeReceipt:
    """`peftk.functional.merge_` after its checks. W is written last, once everything else has succeeded."""
    with torch.no_grad():
        lora_A, lora_B = lora_A.detach().clone(), lora_B.detach().clone()
        server = _server("merge", weight, lora_A, backend)
        merged, code = server.merge(weight.detach(), lora_A, lora_B, scaling)
        checksum, finite = server.inspect(merged)
        if not finite:
            raise ValueError("weight: expected W + s·BA to be finite in every element, got inf or NaN; W is unchanged")
        raw_index = _places(code == RAW)
        receipt = MergeReceipt(
            lora_A, lora_B, scaling, code, raw_index, weight.flatten()[raw_index], weight.dtype, checksum
        )
        weight.copy_(merged)
    return receipt


def unmerge_(weight: Tensor, receipt: MergeReceipt, backend: str | None) -> None:
    """`peftk.functional.unmerge_` after its checks."""
    if weight.shape != receipt.code.shape:
        raise ValueError(f"weight: expected shape {list(receipt.code.shape)} of the merge, got {list(weight.shape)}")
    if weight.dtype != receipt.dtype:
        raise ValueError(f"weight: expected dtype {receipt.dtype} of the merge, got {weight.dtype}")
    if weight.device != receipt.code.device:
        raise ValueError(f"weight: expected on {receipt.code.device} like the receipt, got {weight.device}")
    server = _server("unmerge", weight, receipt.lora_A, backend)
    if server.inspect(weight.detach())[0] != receipt.checksum:
        raise ValueError(
            "weight: expected the bits that the merge left, got others; it was changed since, or is another"
        )
    with torch.no_grad():
        back = server.unmerge(weight.detach(), receipt.lora_A, receipt.lora_B, receipt.scaling, receipt.code)
        back.view(-1)[receipt.raw_index] = receipt.raw_values
        weight.copy_(back)


def _places(mask: Tensor) -> Tensor:
    """Where the flattened mask is True, int64."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))  # ten times as fast as torch's nonzero
    return mask.flatten().nonzero().flatten()


def _server(op: str, weight: Tensor, lora_A: Tensor, backend: str | None) -> ModuleType:
    N, K = weight.shape
    call = backends.Call(op, weight.device.type, weight.dtype, weight.dtype, lora_A.dtype, N, K, N, lora_A.shape[0], 1)
    return backends.module(backends.choose(call, backend).backend)
