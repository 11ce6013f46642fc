"""BitFitLinear: a drop-in nn.Linear in which only the bias trains."""

from __future__ import annotations

from torch import Tensor, nn

from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.parameters import param
from peftk.nn.replace import as_linear, fan_in_fan_out, take_place


class BitFitLinear(FrozenLinear):
    """y = xWᵀ + bias with W frozen and bias [N] trained in place. Both are the linear's own Parameters, same names.

    No parameter is added, so the state_dict is that of the linear. In a `MultiLoRALinear`, beside other adapters, the
    adapter is β = trained bias − the base model's bias. Precision: `peftk.functional.lora_linear`.

    If another method trains W too (such as a head that trains in full), torch's own linear computes the layer.

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

        Raises TypeError for any other module, ValueError for a linear without a bias; `linear` is unchanged then.
        """
        base = as_linear(linear)
        return take_place(cls(base.weight, base.bias, fan_in_fan_out=fan_in_fan_out(linear)), linear)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → y [..., N], in x's dtype."""
        weight = param(self, "weight")
        if weight is not None and weight.requires_grad:  # no kernel computes W's gradient
            return nn.functional.linear(x, self.matrix, param(self, "bias"))
        return super().forward(x)
