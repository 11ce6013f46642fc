"""The same layer in other libraries, built with their own public functions and left at their defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftk import extras


def has_peft() -> bool:
    return extras.installed("peft")


def peft_layer(linear: nn.Linear, adapters: Mapping[str, tuple[Tensor, Tensor]], scaling: float) -> Any:
    """HF PEFT's LoRA layer over `linear` (which it keeps, not copies), the first adapter active.

    PEFT holds adapters in fp32 over a 16-bit base, as it does by default. The layer is called itself, without the
    wrapper of a PeftModel, which would only add time.
    """
    import peft

    model: Any = None
    for name, (lora_A, lora_B) in adapters.items():
        rank = lora_A.shape[0]
        config = peft.LoraConfig(r=rank, lora_alpha=_alpha(scaling, rank), target_modules=["linear"])
        if model is None:
            model = peft.get_peft_model(_Holder(linear), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        layer = model.base_model.model.linear
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(lora_A)
            layer.lora_B[name].weight.copy_(lora_B)
    return layer.eval()


def _alpha(scaling: float, rank: int) -> int:
    alpha = scaling * rank
    if not math.isclose(alpha, round(alpha)):
        raise ValueError(f"scaling: expected scaling·rank to be whole, as PEFT's lora_alpha is, got {alpha}")
    return round(alpha)


class _Holder(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
