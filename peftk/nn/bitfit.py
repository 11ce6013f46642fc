"""BitFitLinear: a drop-in nn.Linear of which only the bias trains."""

from __future__ import annotations

from torch import Tensor, nn

from peftk import checks, functional
from peftk.nn.parameters import own
from peftk.nn.replace import replaceable, take_place


class BitFitLinear(nn.Module):
    """y = xWᵀ + bias with W frozen and bias [N] trained in place: the linear's own Parameters, of the same names.

    No parameter is added, so its state_dict is that of the linear. Served beside other adapters (`MultiLoRALinear`),
    the adapter is β = trained bias − the base model's. Precision: `peftk.functional.lora_linear`.

    Source: Ben Zaken et al. 2021.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        checks.base(weight.detach(), None if bias is None else bias.detach())
        if bias is None:
            raise ValueError("bias: expected a tensor [N] to train, got None")
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight.requires_grad_(False), bias.requires_grad_(True)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> BitFitLinear:
        """The layer that replaces `linear`.

        Raises TypeError or ValueError for another module or a linear without a bias; `linear` is unchanged then.
        """
        replaceable(linear)
        return take_place(cls(linear.weight, linear.bias), linear)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → y [..., N], in x's dtype."""
        return functional.lora_linear_unchecked(x, own(self, "weight"), own(self, "bias"), None, None, 1.0)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
