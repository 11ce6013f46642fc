"""The Parameters of a bottleneck s·act(x Aᵀ + a)Bᵀ + β, which series and parallel adapters share."""

from __future__ import annotations

import math

import torch
from torch import nn

from peftk.adapters import checks
from peftk.system.lasting import lasting

PARAMETERS = ("lora_A", "lora_B", "bias_A", "bias_B")


@lasting()
def bottleneck_parameters(
    K: int,
    N: int,
    R: int,
    activation: str,
    scaling: float,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> dict[str, nn.Parameter]:
    """lora_A [R, K], lora_B [N, R], bias_A [R] and bias_B [N], uninitialised.

    Raises ValueError or TypeError for a bad size, activation, scaling or dtype.
    """
    for name, size in (("in_features", K), ("out_features", N), ("bottleneck", R)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}: expected an integer of 1 or more, got {size!r}")
    checks.adapter_dtype(dtype)
    shapes = ((R, K), (N, R), (R,), (N,))
    tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    checks.adapter_shapes(N, K, tensors[0], tensors[1], scaling, activation=activation)
    return {name: nn.Parameter(tensor) for name, tensor in zip(PARAMETERS, tensors, strict=True)}


def reset_bottleneck(module: nn.Module) -> None:
    """Sets A to kaiming-uniform (as nn.Linear's weight), and B, a and β to zero: the adapter adds nothing."""
    A, *rest = (module.get_parameter(name) for name in PARAMETERS)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    for parameter in rest:
        nn.init.zeros_(parameter)


class Bottleneck(nn.Module):
    """The Parameters of s·act(x Aᵀ + a)Bᵀ + β as a module: lora_A [R, K], lora_B [N, R], bias_A [R], bias_B [N]."""

    adapter_parameters = PARAMETERS

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    bias_A: nn.Parameter
    bias_B: nn.Parameter

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
        parameters = bottleneck_parameters(in_features, out_features, bottleneck, activation, scaling, dtype, device)
        self.in_features, self.out_features, self.bottleneck = in_features, out_features, bottleneck
        self.activation, self.scaling = activation, float(scaling)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets A to kaiming-uniform, and B, a and β to zero: the adapter adds nothing."""
        reset_bottleneck(self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bottleneck={self.bottleneck}, "
            f"activation={self.activation}, scaling={self.scaling:g}"
        )
