"""BitFitLinear: a drop-in nn.Linear of which only the bias trains."""

from __future__ import annotations

from torch import Tensor, nn

from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.parameters import own
from peftk.nn.replace import fan_in_fan_out, replaceable, take_place


class BitFitLinear(FrozenLinear):
    """y = xWᵀ + bias with W frozen and bias [N] trained in place: the linear's own Parameters, of the same names.

    No parameter is added, so its state_dict is that of the linear. Served beside other adapters (`MultiLoRALinear`),
    the adapter is β = trained bias − the base model's. Precision: `peftk.functional.lora_linear`.

    Where another method trains W too (a head that trains whole), torch's linear runs it.

    Source: Ben Zaken et al. 2021.
    """

    adds_nothing = True

    def __init__(self, weight: Tensor, bias: Tensor | None, *, fan_in_fan_out: bool = False) -> None:
        if bias is None:
            raise ValueError("bias: expected a tensor [N] to train, got None")
        super().__init__(weight, bias, fan_in_fan_out=fan_in_fan_out)
        bias.requires_grad_(True)

    @classmethod
    def from_linear(cls, linear: nn.Module) -> BitFitLinear:
        """The layer that replaces `linear` (nn.Linear or Conv1D).

        Raises TypeError or ValueError for another module or a linear without a bias; `linear` is unchanged then.
        """
        base = replaceable(linear)
        return take_place(cls(base.weight, base.bias, fan_in_fan_out=fan_in_fan_out(linear)), linear)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → y [..., N], in x's dtype."""
        weight = own(self, "weight")
        if weight is not None and weight.requires_grad:  # which no kernel has a gradient for
            return nn.functional.linear(x, self.matrix, own(self, "bias"))
        return super().forward(x)
