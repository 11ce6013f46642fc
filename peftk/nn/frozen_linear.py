"""What every drop-in linear has in common: the weight and bias of the linear that it stands in for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftk.adapters import checks
from peftk.nn.parameters import own
from peftk.nn.watched import handed_out
from peftk.ops.layer_calls import base_linear_unchecked


def linear_shape(weight: Tensor, bias: Tensor | None, fan_in_fan_out: bool) -> tuple[int, int]:
    """N, K. Raises TypeError or ValueError where these are no linear layer's weight and bias."""
    checks.floating("weight", weight)
    if bias is not None:
        checks.floating("bias", bias)
    matrix = weight.detach().t() if fan_in_fan_out else weight.detach()
    checks.base(matrix, None if bias is None else bias.detach())
    N, K = matrix.shape
    return N, K


class FrozenLinear(nn.Module):
    """y = xWᵀ + bias with W frozen, by peftk's kernels: the base layer of the others, and of BitFit, which trains bias.

    `weight` and `bias` are the linear's own Parameters, not copies. fan_in_fan_out: the weight is stored [K, N], as
    transformers' Conv1D does; kernels read it through its other stride, so nothing is copied.
    """

    # the Parameters that this layer adds to the model, which train
    adapter_parameters: tuple[str, ...] = ()
    # whether another layer may take its place as it would take the linear's
    adds_nothing = False

    def __init__(self, weight: Tensor, bias: Tensor | None, *, fan_in_fan_out: bool = False) -> None:
        """Raises TypeError or ValueError, before it touches the Parameters, where they are no linear layer's."""
        super().__init__()
        self.out_features, self.in_features = linear_shape(weight, bias, fan_in_fan_out)
        self.fan_in_fan_out = fan_in_fan_out
        self.weight = weight.requires_grad_(False)
        self.bias = None if bias is None else bias.requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return handed_out(self, found) if name == "weight" else found

    @property
    def matrix(self) -> Tensor:
        """W [N, K], a view of `weight` where that is stored [K, N]."""
        weight: Tensor = own(self, "weight")
        return weight.t() if self.fan_in_fan_out else weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → y [..., N], in x's dtype."""
        return base_linear_unchecked(x, self.matrix, own(self, "bias"))

    def extra_repr(self) -> str:
        stored = ", fan_in_fan_out=True" if self.fan_in_fan_out else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{stored}"
