"""The base class of every drop-in linear: it holds the weight and bias of the linear that it replaces."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftk.adapters import checks
from peftk.nn.parameters import param
from peftk.nn.watched import weight_or_alias
from peftk.ops import layer_calls


def linear_shape(weight: Tensor, bias: Tensor | None, fan_in_fan_out: bool) -> tuple[int, int]:
    """N, K. Raises TypeError or ValueError unless these are the weight and bias of a linear layer."""
    checks.floating("weight", weight)
    if bias is not None:
        checks.floating("bias", bias)
    matrix = weight.detach().t() if fan_in_fan_out else weight.detach()
    checks.base(matrix, None if bias is None else bias.detach())
    N, K = matrix.shape
    return N, K


class FrozenLinear(nn.Module):
    """y = xWᵀ + bias with W and bias frozen, computed by peftk's kernels. The other drop-in layers derive from it.

    `weight` and `bias` are the linear's own Parameters, not copies. fan_in_fan_out: the weight is stored [K, N], as in
    transformers' Conv1D; kernels read it with swapped strides, so nothing is copied. Precision:
    `peftk.functional.lora_linear`.
    """

    # names of the trainable Parameters that this layer adds to the model
    adapter_parameters: tuple[str, ...] = ()
    # whether another layer may replace this one as it would replace the linear
    adds_nothing = False

    def __init__(self, weight: Tensor, bias: Tensor | None, *, fan_in_fan_out: bool = False) -> None:
        """weight [N, K], or [K, N] with fan_in_fan_out; bias [N].

        Raises TypeError or ValueError unless they are those of a linear layer; they are unchanged then.
        """
        super().__init__()
        self.out_features, self.in_features = linear_shape(weight, bias, fan_in_fan_out)
        self.fan_in_fan_out = fan_in_fan_out
        self.weight = weight.requires_grad_(False)
        self.bias = None if bias is None else bias.requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return weight_or_alias(self, found) if name == "weight" else found

    @property
    def matrix(self) -> Tensor:
        """W [N, K]: `weight`, or its transposed view if it is stored [K, N]."""
        weight: Tensor = param(self, "weight")
        return weight.t() if self.fan_in_fan_out else weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → y [..., N], in x's dtype."""
        return layer_calls.base_linear(x, self.matrix, param(self, "bias"))

    def extra_repr(self) -> str:
        stored = ", fan_in_fan_out=True" if self.fan_in_fan_out else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{stored}"
