"""Error bounds: checks a result against fp64 from the same rounded inputs, before it is timed.

With u the unit roundoff of the result's dtype, a result y of exact value y* passes if, for each element,

    |y − y*| ≤ u·|y*| + c·√k·2⁻²⁴·m + tiny,    c = 2

k is the length of the contraction, m the sum of the absolute values of all terms (`docs/numerics.md`). That allows fp32
accumulation and one rounding, which peftk guarantees. Other libraries also round intermediate results, so they get an
additional 2u·(|base*| + |adapter*|).

On a GPU sums may run on tensor cores, which truncate instead of rounding, so errors add up: there m also counts with
k·2⁻²⁵ (`docs/numerics.md`).

A check is useless if a missing adapter would pass it. `sensitivity` is the ratio of a typical adapter contribution to
the bound; `tools.benchmark.common` requires 4 or more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
TINY = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}
C = 2.0

# The allowed Frobenius norm of the error relative to that of the result, for results of NORM_FROM elements or more.
NORM = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4, torch.float32: 1e-6}
NORM_FROM = 65_536


def bound(
    expected: Tensor, magnitude: Tensor, contraction: int, dtype: torch.dtype, *, truncated: bool = False
) -> Tensor:
    """The allowed |y − y*|. expected: y* fp64; magnitude: the sum of the absolute values of all terms, fp64.

    truncated: the sums may run on tensor cores.
    """
    terms = max(contraction, 1)
    accumulated = (C * terms**0.5 * 2.0**-24 + (terms * 2.0**-25 if truncated else 0.0)) * magnitude
    return UNIT[dtype] * (expected.abs() + accumulated) + accumulated + TINY[dtype]


class Expected(NamedTuple):
    """The exact result (fp64), the sum of its terms' absolute values, and the parts that other libraries round."""

    value: Tensor
    magnitude: Tensor
    contraction: int
    base: Tensor
    adapter: Tensor

    def allowed(self, dtype: torch.dtype, *, fused: bool, truncated: bool = False) -> Tensor:
        """The bound on |y − y*|. fused: the result is rounded once; else its parts are rounded too."""
        allowed = bound(self.value, self.magnitude, self.contraction, dtype, truncated=truncated)
        return allowed if fused else allowed + 2 * UNIT[dtype] * (self.base.abs() + self.adapter.abs())


def error(actual: Tensor, expected: Expected, *, fused: bool, more: Tensor | float = 0.0) -> float:
    """The largest error as a multiple of the bound; ≤ 1 passes. inf for a wrong shape or values that are not finite.

    more: added to the bound.
    """
    if actual.shape != expected.value.shape or not bool(actual.isfinite().all()):
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - expected.value).abs()
    return float((difference / (expected.allowed(actual.dtype, fused=fused, truncated=actual.is_cuda) + more)).max())


def sensitivity(expected: Expected, dtype: torch.dtype) -> float:
    """The median over elements of |adapter contribution| / bound, for the widest bound in use (not fused)."""
    return float((expected.adapter.abs() / expected.allowed(dtype, fused=False)).median())


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Expected:
    """y = xWᵀ + bias + s·(xAᵀ)Bᵀ, for one adapter, in fp64."""
    base, base_magnitude = linear(x, weight, bias)
    return with_adapter(x, base, base_magnitude, lora_A, lora_B, scaling)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """xWᵀ + bias and |x||W|ᵀ + |bias|, in fp64. Costly, so callers reuse it for all ranks of a shape."""
    wide_x, wide_W = x.detach().double(), weight.detach().double()
    value, magnitude = wide_x @ wide_W.T, wide_x.abs() @ wide_W.abs().T
    if bias is not None:
        value, magnitude = value + bias.detach().double(), magnitude + bias.detach().double().abs()
    return value, magnitude


def with_adapter(
    x: Tensor, base: Tensor, base_magnitude: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Expected:
    """Adds s·(xAᵀ)Bᵀ to the result of `linear`."""
    wide_x, A, B = x.detach().double(), lora_A.detach().double(), lora_B.detach().double()
    adapter = scaling * (wide_x @ A.T) @ B.T
    magnitude = base_magnitude + abs(scaling) * (wide_x.abs() @ A.abs().T) @ B.abs().T
    return Expected(base + adapter, magnitude, x.shape[-1], base, adapter)


def of_field(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor | float:
    """What `peftk.precision("field")` adds to the bound of y, without an activation."""
    if x.dtype == torch.float32:
        return 0.0  # such calls stay exact
    wide_x, A, B = x.detach().double(), lora_A.detach().double(), lora_B.detach().double()
    v = (wide_x @ A.T).abs()
    rounded = v if lora_A.dtype == x.dtype else 2 * v + wide_x.abs() @ A.abs().T
    return UNIT[x.dtype] * abs(scaling) * rounded @ B.abs().T


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> dict[str, Expected]:
    """dx = dY W + s·(dY B) A, dA = s·(dY B)ᵀ x, dB = s·dYᵀ (x Aᵀ)."""
    M, K, N = x.shape[0], weight.shape[1], weight.shape[0]
    wide = [t.detach().double() for t in (dy, x, weight, lora_A, lora_B)]
    exact, size = _gradients(scaling, *wide), _gradients(abs(scaling), *(t.abs() for t in wide))
    return {
        "x": Expected(exact[0] + exact[1], size[0] + size[1], N, exact[0], exact[1]),
        "lora_A": Expected(exact[2], size[2], max(M, N), torch.zeros_like(exact[2]), exact[2]),
        "lora_B": Expected(exact[3], size[3], max(M, K), torch.zeros_like(exact[3]), exact[3]),
    }


def _gradients(s: float, dy: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
    u = s * dy @ B
    return dy @ W, u @ A, u.T @ x, s * dy.T @ (x @ A.T)


def merged(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Expected:
    """W + s·BA."""
    W, A, B = (t.detach().double() for t in (weight, lora_A, lora_B))
    delta = scaling * B @ A
    magnitude = W.abs() + abs(scaling) * B.abs() @ A.abs()
    return Expected(W + delta, magnitude, lora_A.shape[0], W, delta)
