"""`quantize`: a plain weight to a packed one, in plain torch, by the rule of the library that owns the format."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftk.quantized.formats import CODEBOOKS, codebook, pack_halves, pack_pairs
from peftk.quantized.weight import QuantizedWeight


def quantize(weight: Tensor, format: str, *, group: int | None = None) -> QuantizedWeight:
    """W [N, K] in fp32, bf16 or fp16 → the nearest codes of `format`, with a scale per `group` elements of a row.

    format: int8 (group None: a row; symmetric, s = max|W| / 127), int4 (32, 64 or 128, default 64; symmetric,
    s = max|W| / 7, codes 1 … 15), nf4 or fp4 (default 64, of bitsandbytes), q8_0 or q4_0 (32, GGUF's).

    Codes are rounded to nearest, ties to even, from W in fp32; q4_0 and q8_0 by ggml's own rule, nf4 and fp4 by
    bitsandbytes', so that the packed bits are theirs.

    Raises TypeError or ValueError for a weight, format or group that it does not take, and for values that are not
    finite.
    """
    if not isinstance(weight, Tensor) or isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: expected a plain tensor, got {type(weight).__name__}")
    if not weight.dtype.is_floating_point or weight.element_size() < 2:
        raise TypeError(f"weight: expected float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape [N, K] with N, K ≥ 1, got {list(weight.shape)}")
    if not isinstance(format, str) or format not in _QUANTIZE:
        raise ValueError(f"format: expected one of {', '.join(_QUANTIZE)}, got {format!r}")
    default, run = _QUANTIZE[format]
    K = weight.shape[1]
    group = (default or K) if group is None else group
    if not isinstance(group, int) or group < 1 or (K % group and format not in CODEBOOKS):
        raise ValueError(f"group: expected a divisor of K = {K} for format {format}, got {group!r}")
    if format in ("int4", "q8_0", "q4_0") and (group % 32 or (format != "int4" and group != 32)):
        raise ValueError(f"group: expected {'32, 64 or 128' if format == 'int4' else '32'}, got {group}")
    wide = weight.detach().float().contiguous()
    if not bool(wide.isfinite().all()):
        raise ValueError("weight: expected finite values, got inf or nan")
    return run(wide, format, group, torch.float32 if weight.dtype == torch.float64 else weight.dtype)


def _symmetric(weight: Tensor, group: int, most: int) -> tuple[Tensor, Tensor]:
    """Codes [N, K] from −most to most, and scales [N, K / group], fp32. A group of zeros has scale 0."""
    groups = weight.unflatten(1, (-1, group))
    scales = groups.abs().amax(-1, keepdim=True) / most
    codes = torch.where(scales > 0, groups / scales, 0.0).round().clamp(-most, most)
    return codes.flatten(1), scales.squeeze(-1)


def _int8(weight: Tensor, format: str, group: int, dtype: torch.dtype) -> QuantizedWeight:
    codes, scales = _symmetric(weight, group, 127)
    return QuantizedWeight(format, weight.shape, codes.to(torch.int8), scales, block=(1, group), dtype=dtype)


def _int4(weight: Tensor, format: str, group: int, dtype: torch.dtype) -> QuantizedWeight:
    codes, scales = _symmetric(weight, group, 7)
    packed = pack_halves((codes + 8).to(torch.uint8))
    return QuantizedWeight(format, weight.shape, packed, scales, block=(1, group), dtype=dtype)


def _codebook(weight: Tensor, format: str, group: int, dtype: torch.dtype) -> QuantizedWeight:
    """bitsandbytes' rule: w · (1 / max|W|) to the nearest entry; at a midpoint of two, to the smaller one."""
    table = codebook(format, weight.device)
    order = table.argsort(stable=True)
    midpoints = (table[order[:-1]] + table[order[1:]]) / 2
    flat = weight.reshape(-1)
    missing = -flat.numel() % group
    blocks = torch.nn.functional.pad(flat, (0, missing)).view(-1, group)
    absmax = blocks.abs().amax(-1)
    inverse = 1.0 / absmax.clamp(min=1e-38)
    scaled = (blocks * inverse[:, None]).clamp(-1, 1).view(-1)[: flat.numel()]
    codes = order[torch.bucketize(scaled, midpoints)].to(torch.uint8)
    packed = pack_pairs(torch.nn.functional.pad(codes, (0, codes.numel() % 2)), high_first=True)
    return QuantizedWeight(format, weight.shape, packed, absmax, block=(1, group), dtype=dtype)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _gguf(scale: Tensor, bytes_: Tensor, shape: torch.Size, format: str, dtype: torch.dtype) -> QuantizedWeight:
    blocks = torch.cat([scale.half().view(torch.uint8), bytes_.view(torch.uint8)], dim=-1)
    return QuantizedWeight(format, shape, blocks.view(shape[0], -1), block=(1, 32), dtype=dtype)


def _q8_0(weight: Tensor, format: str, group: int, dtype: torch.dtype) -> QuantizedWeight:
    """ggml's rule: s = max|W| / 127, and halves away from zero."""
    blocks = weight.unflatten(1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    magnitude = scaled.abs()
    floor = magnitude.floor()
    rounded = scaled.sign() * (floor + (2 * (magnitude - floor)).floor())
    return _gguf(scale, rounded.to(torch.int8), weight.shape, format, dtype)


def _q4_0(weight: Tensor, format: str, group: int, dtype: torch.dtype) -> QuantizedWeight:
    """ggml's rule: s = w / −8 for the w of the largest |w|, the first of equal ones; codes are ⌊w / s + 8.5⌋."""
    blocks = weight.unflatten(1, (-1, 32))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    codes = (blocks * _inverse(scale) + 8.5).trunc().to(torch.uint8).clamp(0, 15)
    return _gguf(scale, pack_halves(codes), weight.shape, format, dtype)


_QUANTIZE: dict[str, tuple[int | None, Callable[[Tensor, str, int, torch.dtype], QuantizedWeight]]] = {
    "int8": (None, _int8),
    "int4": (64, _int4),
    "nf4": (64, _codebook),
    "fp4": (64, _codebook),
    "q8_0": (32, _q8_0),
    "q4_0": (32, _q4_0),
}
