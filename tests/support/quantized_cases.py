"""Packed weights for tests."""

from __future__ import annotations

import dataclasses
import random

import torch

from peftk.adapters.adapter import Adapter
from peftk.quantized.formats import FORMATS
from peftk.quantized.quantize import quantize
from peftk.quantized.weight import QuantizedWeight
from tests.support.cases import Case, random_case

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


def quantized_case(format: str, seed: int, **weight: object) -> tuple[Case, Case]:
    """A random case over a weight in this format, and the same case over the dequantized one."""
    choose = random.Random(seed)
    case = next(case for n in range(100) if not (case := random_case(seed + 1000 * n, max_rows=80)).columns)
    N, K = choose.choice([(64, 128), (96, 64), (33, 256), (160, 320)])
    found = random_weight(format, N, K, seed=seed, **weight)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(like.dtype)

    adapters = []
    for adapter in case.adapters:
        if adapter is None:
            adapters.append(None)
            continue
        if not adapter.pages_A:  # biases alone
            adapters.append(Adapter((), (), 1.0, "identity", None, normal(N, like=adapter.tensors()[0])))
            continue
        r, dtype = adapter.rank, adapter.pages_A[0]
        A, B = normal(r, K, like=dtype) * K**-0.5, normal(N, r, like=dtype) * r**-0.5
        biases = normal(r, like=dtype), normal(N, like=dtype)
        adapters.append(Adapter((A,), (B,), adapter.scaling, adapter.activation, *biases))
    x, bias = normal(len(case.x), K, like=case.x), normal(N, like=torch.zeros(0))
    made = dataclasses.replace(case, x=x, weight=found, bias=bias, adapters=tuple(adapters))
    return made, dataclasses.replace(made, weight=found.dequantize())
