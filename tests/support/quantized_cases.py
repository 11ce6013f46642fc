"""Packed weights for tests."""

from __future__ import annotations

import torch

from peftk.quantized.formats import FORMATS
from peftk.quantized.quantize import quantize
from peftk.quantized.weight import QuantizedWeight

# (format, group) of `quantize`
QUANTIZED = [
    ("int8", None),
    ("int8", 32),
    ("int8", 128),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
    ("nf4", 64),
    ("fp4", 64),
    ("q8_0", None),
    ("q4_0", None),
]


def random_weight(
    format: str,
    N: int,
    K: int,
    *,
    group: int | None = None,
    zeros: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> QuantizedWeight:
    """W [N, K] in any format, with values of about 1 / √K. group: elements of a row that share a scale."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(N, K, generator=generator) * K**-0.5
    if format in ("nf4", "fp4"):
        return quantize(plain, format, group=group or 64)
    if format in ("q8_0", "q4_0"):
        return quantize(plain, format)
    if format in ("int8", "int4"):
        made = quantize(plain, format, group=group or (K if format == "int8" else 32))
        assert made.scales is not None
        points = torch.randint(0, 16, made.scales.shape, generator=generator, dtype=torch.uint8) if zeros else None
        return QuantizedWeight(
            format, (N, K), made.packed, made.scales.to(scale_dtype), points, block=made.block, dtype=torch.float32
        )
    if format == "int8_absmax":
        absmax = plain.abs().amax(1, keepdim=True)
        codes = (plain / absmax * 127).round().to(torch.int8)
        return QuantizedWeight(format, (N, K), codes, absmax, block=(1, K))
    if format == "fp8_e4m3":
        scales = torch.rand(-(-N // 128), -(-K // 128), generator=generator) * 1e-2 + 1e-3
        spread = scales.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
        return QuantizedWeight(
            format, (N, K), (plain / spread).clamp(-448, 448).to(torch.float8_e4m3fn), scales, block=(128, 128)
        )
    assert format == "mxfp4", f"a case for each of {list(FORMATS)}"
    packed = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(119, 123, (N, K // 32), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(format, (N, K), packed, exponents, block=(1, 32))
