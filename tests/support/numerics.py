"""The error bound of results, in tests. `docs/numerics.md` derives it.

The bound per element is `peftk.reference.bounds`, which `peftk bench` and `peftk selftest` use as well.

Against an fp64 reference computed from the same rounded inputs, per element, with u the unit roundoff of the output:

    |y − y*| ≤ u·|y*| + c·√K·2⁻²⁴·(|x||W|ᵀ + |s||v||B|ᵀ + |bias|)

and for outputs of 65,536 elements or more, in the Frobenius norm relative to the reference: bf16 1.7e-3, fp16 2.1e-4,
fp32 1e-6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftk.reference.bounds import NORM, NORM_FROM, TINY, UNIT, bound


def check(
    actual: Tensor,
    expected: Tensor,
    magnitude: Tensor,
    contraction: int,
    *,
    dtype: torch.dtype | None = None,
    rounded: Tensor | None = None,
) -> None:
    """Raises AssertionError with the worst element if `actual` is outside the bound or the norm.

    rounded: a part of the sum that was rounded before the rest was added (the `gemm` backend's base layer).
    """
    dtype = dtype or actual.dtype
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    error = (actual.double() - expected).abs()
    allowed = bound(expected, magnitude, contraction, dtype)
    if rounded is not None:
        allowed = allowed + UNIT[dtype] * rounded.abs() * (1 + UNIT[dtype]) + TINY[dtype]
    assert actual.isfinite().all(), "not finite"
    ratio = error / allowed
    worst = int(ratio.argmax())
    assert ratio.max() <= 1.0, (
        f"element {worst} of {tuple(actual.shape)}: got {actual.flatten()[worst].item()!r}, expected "
        f"{expected.flatten()[worst].item()!r}, error {float(ratio.max()):.2f} times the bound"
    )
    if actual.numel() >= NORM_FROM and rounded is None:
        norm, allowed_norm = float(error.norm()), NORM[dtype] * float(expected.norm())
        assert norm <= allowed_norm, f"norm of the error {norm:.2e}, allowed {allowed_norm:.1e} for {dtype}"
