"""What a merge leaves behind: everything that brings W back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from peftk.reference.merge import Factors


@dataclasses.dataclass(frozen=True)
class MergeReceipt:
    """Everything that brings W back from W' bit for bit; independent of the tensors that the merge was called with.

    factors: the adapters, copied. code [N, K] int8 is the distance between W and what plain subtraction gives; the few
    weights whose distance does not fit in it lie in raw_values (W's dtype), at raw_index (int64, ascending) of the
    flattened W. checksum: of W'.
    """

    factors: Factors
    code: Tensor
    raw_index: Tensor
    raw_values: Tensor
    checksum: int

    @property
    def dtype(self) -> torch.dtype:
        """W's."""
        return self.raw_values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held, A and B included."""
        tensors = (self.factors.lora_A, self.factors.lora_B, self.code, self.raw_index, self.raw_values)
        return sum(tensor.nbytes for tensor in tensors)

    def to(self, device: torch.device) -> MergeReceipt:
        """The same receipt with its tensors on another device, for a W that has moved."""
        lora_A, lora_B = self.factors.lora_A.to(device), self.factors.lora_B.to(device)
        names = ("code", "raw_index", "raw_values")
        moved = {name: getattr(self, name).to(device) for name in names}
        return dataclasses.replace(self, factors=self.factors._replace(lora_A=lora_A, lora_B=lora_B), **moved)
