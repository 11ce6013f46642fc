"""Bottleneck: the Parameters that series and parallel adapters have."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peftk import checks


class Bottleneck(nn.Module):
    """The Parameters of s·act(x Aᵀ + a)Bᵀ + β: lora_A [R, K], lora_B [N, R], bias_A [R], bias_B [N].

    A starts as kaiming-uniform (as nn.Linear's own weight), B, a and β as zero, so that a new adapter adds nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bottleneck: int,
        activation: str,
        scaling: float,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        sizes = (("in_features", in_features), ("out_features", out_features), ("bottleneck", bottleneck))
        for name, size in sizes:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected an integer of 1 or more, got {size!r}")
        checks.adapter_dtype(dtype)
        A = torch.empty(bottleneck, in_features, dtype=dtype, device=device)
        B = torch.empty(out_features, bottleneck, dtype=dtype, device=device)
        checks.adapter_shapes(out_features, in_features, A, B, scaling, activation)
        self.in_features, self.out_features, self.bottleneck = in_features, out_features, bottleneck
        self.activation, self.scaling = activation, float(scaling)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.bias_A = nn.Parameter(A.new_empty(bottleneck))
        self.bias_B = nn.Parameter(A.new_empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A kaiming-uniform, B, a and β zero: nothing is added."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        for parameter in (self.lora_B, self.bias_A, self.bias_B):
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        width = (
            f"width={self.in_features}"
            if self.in_features == self.out_features
            else f"in_features={self.in_features}, out_features={self.out_features}"
        )
        return f"{width}, bottleneck={self.bottleneck}, activation={self.activation}, scaling={self.scaling:g}"


def default_dtype(weight: Tensor) -> torch.dtype:
    """Of an adapter beside `weight`: fp32, as HF PEFT trains adapters of 16-bit models; fp64 beside fp64."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
