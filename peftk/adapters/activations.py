"""The activations that an adapter may have: their formulas, derivatives and kernel codes.

Every kernel (C++, CUDA, Triton) switches on the codes. They are part of the table layout in `peftk.adapters.table` and
must agree with `csrc/common/activation.h` and `triton_kernels/arithmetic.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CODES = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}

_TANH_C = math.sqrt(2.0 / math.pi)
_TANH_D = 0.044715


def apply(name: str, z: Tensor) -> Tensor:
    """v = act(z), elementwise in z's dtype. `gelu` is the exact erf form, `gelu_tanh` its tanh approximation."""
    if name == "identity":
        return z
    if name == "relu":
        return torch.relu(z)
    if name == "gelu":
        return torch.nn.functional.gelu(z)
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(z, approximate="tanh")
    if name == "silu":
        return torch.nn.functional.silu(z)
    raise ValueError(f"activation: expected one of {', '.join(CODES)}, got {name!r}")


def derivative(name: str, z: Tensor) -> Tensor:
    """act'(z), elementwise in z's dtype; relu'(0) = 0, as in torch."""
    if name == "identity":
        return torch.ones_like(z)
    if name == "relu":
        return (z > 0).to(z.dtype)
    if name == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5)))
        pdf = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
        return cdf + z * pdf
    if name == "gelu_tanh":
        t = torch.tanh(_TANH_C * (z + _TANH_D * z**3))
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * _TANH_C * (1.0 + 3.0 * _TANH_D * z * z)
    if name == "silu":
        s = torch.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    raise ValueError(f"activation: expected one of {', '.join(CODES)}, got {name!r}")
