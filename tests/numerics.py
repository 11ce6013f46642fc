"""The one place that knows error bounds. `docs/numerics.md` argues them.

Against an fp64 reference computed from the same rounded inputs, per element, with u the unit roundoff of the output:

    |y − y*| ≤ u·|y*| + c·√K·2⁻²⁴·(|x||W|ᵀ + |s||v||B|ᵀ + |bias|)

and for outputs of 65,536 elements or more, in the Frobenius norm relative to the reference: bf16 1.7e-3, fp16 2.1e-4,
fp32 1e-6.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
NORM = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4, torch.float32: 1e-6}
TINY = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}
NORM_FROM = 65_536
C = 2.0


def bound(expected: Tensor, magnitude: Tensor, contraction: int, dtype: torch.dtype) -> Tensor:
    """The allowed |y − y*|. expected: y* fp64; magnitude: the sum of the absolute values of all terms, fp64."""
    accumulated = C * max(contraction, 1) ** 0.5 * 2.0**-24 * magnitude
    return UNIT[dtype] * (expected.abs() + accumulated) + accumulated + TINY[dtype]


def check(
    actual: Tensor, expected: Tensor, magnitude: Tensor, contraction: int, *, dtype: torch.dtype | None = None
) -> None:
    """Raises AssertionError with the worst element where `actual` is outside the bound or the norm."""
    dtype = dtype or actual.dtype
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    error = (actual.double() - expected).abs()
    allowed = bound(expected, magnitude, contraction, dtype)
    assert actual.isfinite().all(), "not finite"
    ratio = error / allowed
    worst = int(ratio.argmax())
    assert ratio.max() <= 1.0, (
        f"element {worst} of {tuple(actual.shape)}: got {actual.flatten()[worst].item()!r}, expected "
        f"{expected.flatten()[worst].item()!r}, error {float(ratio.max()):.2f} times the bound"
    )
    if actual.numel() >= NORM_FROM:
        norm = float(error.norm() / expected.norm())
        assert norm <= NORM[dtype], f"relative norm of the error {norm:.2e}, allowed {NORM[dtype]:.1e} for {dtype}"
