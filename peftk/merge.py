"""Merging and exact unmerging: what a receipt holds and how it is used. Arithmetic: `peftk.reference.merge`."""

from __future__ import annotations

import dataclasses
from types import ModuleType

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
        if not bool(torch.isfinite(merged).all()):
            raise ValueError("weight: expected W + s·BA to be finite in every element, got inf or NaN; W is unchanged")
        raw_index = (code == RAW).flatten().nonzero().flatten()
        receipt = MergeReceipt(
            lora_A, lora_B, scaling, code, raw_index, weight.flatten()[raw_index], weight.dtype, checksum(merged)
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
    if checksum(weight) != receipt.checksum:
        raise ValueError(
            "weight: expected the bits that the merge left, got others; it was changed since, or is another"
        )
    with torch.no_grad():
        server = _server("unmerge", weight, receipt.lora_A, backend)
        back = server.unmerge(weight.detach(), receipt.lora_A, receipt.lora_B, receipt.scaling, receipt.code)
        back.view(-1)[receipt.raw_index] = receipt.raw_values
        weight.copy_(back)


def checksum(weight: Tensor) -> int:
    """A number that changes when any bit of W [N, K] does, or when rows or columns change places.

    Sums of the bits along rows and along columns, each weighted by an odd multiplier of its place, modulo 2⁶⁴.
    """
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    bits = weight.detach().contiguous().view(integer)
    total = 0
    for dim, multiplier in ((0, 0x9E3779B97F4A7C15), (1, 0xC2B2AE3D27D4EB4F)):
        sums = bits.sum(dim, dtype=torch.int64)
        place = torch.arange(1, sums.numel() + 1, device=sums.device, dtype=torch.int64)
        mixed = (place * (multiplier - 2**64 if multiplier >= 2**63 else multiplier)) | 1
        total = (total * 31 + int((sums * mixed).sum())) & (2**64 - 1)
    return total


def _server(op: str, weight: Tensor, lora_A: Tensor, backend: str | None) -> ModuleType:
    N, K = weight.shape
    call = backends.Call(op, weight.device.type, weight.dtype, weight.dtype, lora_A.dtype, N, K, N, lora_A.shape[0], 1)
    return backends.module(backends.choose(call, backend).backend)
