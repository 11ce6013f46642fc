"""QuantizedLinear: a drop-in nn.Linear whose weight is packed, and which other layers may put adapters on."""

from __future__ import annotations

from torch import nn

from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.parameters import param
from peftk.nn.replace import as_linear, fan_in_fan_out, take_place
from peftk.quantized.quantize import quantize
from peftk.quantized.weight import QuantizedWeight


class QuantizedLinear(FrozenLinear):
    """y = xWᵀ + bias, with W packed (`peftk.QuantizedWeight`) and frozen; kernels decode it as they multiply.

    `LoRALinear.from_linear` and `MultiLoRALinear.from_linear` take it as they take an nn.Linear. It has the precision
    of `peftk.functional.lora_linear`, against the dequantized W.
    """

    adds_nothing = True

    @classmethod
    def from_linear(cls, linear: nn.Module, format: str, *, group: int | None = None) -> QuantizedLinear:
        """The layer that replaces `linear` (nn.Linear or Conv1D). format, group: of `peftk.quantized.quantize`.

        Raises TypeError or ValueError for any other module, and for a weight that the format does not take; `linear` is
        unchanged.
        """
        base = as_linear(linear)
        weight = base.weight.detach()
        if isinstance(weight, QuantizedWeight):
            raise TypeError(f"linear: expected a plain weight, got one packed as {weight.format}")
        packed = quantize(weight.t() if fan_in_fan_out(linear) else weight, format, group=group)
        layer = cls(nn.Parameter(packed, requires_grad=False), param(base, "bias"))
        return take_place(layer, linear)

    def extra_repr(self) -> str:
        weight = param(self, "weight")
        return f"{super().extra_repr()}, format={weight.format}, block={weight.block}"
