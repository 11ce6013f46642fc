"""From the layouts of other libraries to a `QuantizedWeight`: each with one conversion, or none where the layout fits.

Nothing is rounded: `dequantize()` of the result has the bits that the library computes in fp32, and, rounded once,
those that it computes in 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftk.quantized.formats import pack_halves
from peftk.quantized.weight import QuantizedWeight

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each half byte of an int32 of AWQ's holds


def from_bitsandbytes_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    *,
    quant_type: str,
    blocksize: int,
    dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """bitsandbytes' nf4 or fp4, packed by `quantize_4bit`. absmax: fp32, or of `nested_absmax`. No copy of `packed`."""
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type: expected nf4 or fp4, got {quant_type!r}")
    data = packed if packed.dtype == torch.uint8 else packed.contiguous().view(torch.uint8)
    return QuantizedWeight(quant_type, shape, data.reshape(-1), absmax.float(), block=(1, blocksize), dtype=dtype)


def nested_absmax(codes: Tensor, code: Tensor, absmax: Tensor, offset: Tensor | float, blocksize: int = 256) -> Tensor:
    """The scales of bitsandbytes' double quantization: code[codes] · absmax of their block + offset, in fp32."""
    _fits("absmax", absmax, (-(-codes.numel() // blocksize),))
    _fits("code", code, (256,))
    scales = absmax.float().repeat_interleave(blocksize)[: codes.numel()]
    return code.float()[codes.reshape(-1).int()] * scales + offset


def from_bitsandbytes_8bit(codes: Tensor, absmax: Tensor, *, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """bitsandbytes' int8 [N, K] with SCB [N]: W = (code · SCB) · (1 / 127), each product rounded to fp32. No copy."""
    N, K = codes.shape
    return QuantizedWeight("int8_absmax", (N, K), codes, absmax.float().reshape(N, 1), block=(1, K), dtype=dtype)


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    zeros_minus_one: bool = True,
    dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """GPTQ's 4 bits: qweight int32 [K / 8, N], qzeros int32 [K / g, N / 8], scales [K / g, N].

    zeros_minus_one: a zero is stored as zero − 1, modulo 16 (checkpoint_format "gptq"); False for "gptq_v2".

    Raises ValueError for shapes that do not fit, and for a g_idx of desc_act=True, whose groups are not consecutive.
    """
    _int32("qweight", qweight)
    _int32("qzeros", qzeros)
    K, N = qweight.shape[0] * 8, qweight.shape[1]
    groups = scales.shape[0]
    _fits("scales", scales, (groups, N))
    _fits("qzeros", qzeros, (groups, N // 8))
    group = _group(K, groups)
    if g_idx is not None and not torch.equal(g_idx.long().cpu(), torch.arange(K) // group):
        raise ValueError("g_idx: expected consecutive groups, got others (desc_act=True)")
    codes = _half_bytes(qweight).transpose(1, 2).reshape(K, N)
    zeros = _half_bytes(qzeros).reshape(groups, N)
    if zeros_minus_one:
        zeros = zeros + 1 & 15
    return _int4(codes, zeros, scales, dtype)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    """AWQ's 4 bits (version GEMM): qweight int32 [K, N / 8], qzeros int32 [K / g, N / 8], scales [K / g, N].

    Raises ValueError for shapes that do not fit.
    """
    _int32("qweight", qweight)
    _int32("qzeros", qzeros)
    K, N = qweight.shape[0], qweight.shape[1] * 8
    groups = scales.shape[0]
    _fits("scales", scales, (groups, N))
    _fits("qzeros", qzeros, (groups, N // 8))
    _group(K, groups)
    back = torch.tensor(_AWQ_ORDER, device=qweight.device).argsort()
    codes = _half_bytes(qweight)[..., back].reshape(K, N)
    zeros = _half_bytes(qzeros)[..., back].reshape(groups, N)
    return _int4(codes, zeros, scales, dtype)


def _int4(codes: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    """codes [K, N], zeros and scales [K / g, N]: stored by columns of W, and turned here."""
    K, N = codes.shape
    group = K // scales.shape[0]
    symmetric = bool((zeros == 8).all())
    turned = zeros.to(torch.uint8).t().contiguous()
    scales = scales.t().contiguous()
    return QuantizedWeight(
        "int4",
        (N, K),
        pack_halves(codes.to(torch.uint8).t().contiguous()),
        # exact; kernels read fp32 faster, and it costs at most 5 % of the bytes then
        scales.float() if group >= 64 else scales,
        None if symmetric else turned,
        block=(1, group),
        dtype=dtype,
    )


def _half_bytes(words: Tensor) -> Tensor:
    """int32 [..., n] → its eight half bytes, the lowest first, int32 [..., n, 8]."""
    return words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32, device=words.device) & 15


def _int32(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int32 or tensor.dim() != 2:
        raise TypeError(f"{name}: expected int32 of two dimensions, got {tensor.dtype} {list(tensor.shape)}")


def _fits(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")


def _group(K: int, groups: int) -> int:
    if groups == 0 or K % groups or K // groups % 32:
        raise ValueError(f"scales: expected K = {K} in groups of a multiple of 32, got {groups} groups")
    return K // groups
