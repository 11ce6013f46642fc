"""The packed forms of a weight W [N, K]: what they hold, and their exact values in fp32, in plain torch.

Every format is codes with scales: W[n, k] = s · (code − zero), or s · codebook[code]. `block` is the rows and columns
of W that share a scale s. Each product below is one fp32 operation, so `values` has the bits of the library that owns
the format. docs/quantized.md has pictures.

| format | packed | scales | block |
|---|---|---|---|
| int8 | int8 [N, K] | s [N, K / g], fp32, bf16 or fp16 | (1, g); g = K: one scale a row |
| int8_absmax | int8 [N, K] | m [N, 1], fp32: W = (code · m) · fl(1/127), bitsandbytes' 8 bits | (1, K) |
| int4 | uint8 [N, K / 2], *halves* | s [N, K / g]; zeros uint8 [N, K / g], or none: 8 | (1, g), g a multiple of 32 |
| nf4, fp4 | uint8 [⌈NK / 2⌉], *pairs*, high half first | m [⌈NK / g⌉], fp32 | (1, g), through all of W |
| fp8_e4m3 | float8_e4m3fn [N, K] | s [⌈N / n⌉, ⌈K / k⌉], fp32 | (n, k): (N, K), (1, K), (128, 128), … |
| mxfp4 | uint8 [N, K / 2], *pairs*, low half first | e uint8 [N, K / 32]: s = 2^(e − 127), e = 255: nan | (1, 32) |
| q8_0 | uint8 [N, K / 32 · 34]: GGUF's blocks of fp16 s and 32 int8 | in the blocks | (1, 32) |
| q4_0 | uint8 [N, K / 32 · 18]: GGUF's blocks of fp16 s and 16 bytes, *halves* | in the blocks; zero 8 | (1, 32) |

*halves*: in each 32 elements, byte i holds element i in its low and element i + 16 in its high four bits. *pairs*:
byte i holds elements 2i and 2i + 1.

Sources: Dettmers et al. 2022 (int8), 2023 (nf4) and bitsandbytes; the OCP specifications Microscaling 1.0 (mxfp4) and
FP8 1.0; ggml's quants (q8_0, q4_0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HALVES = 32  # elements of a block of int4 and q4_0

# bitsandbytes' tables (get_4bit_type), as fp32. fp4: by bit pattern, 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625 / 12, 8.0 / 12, 1.0, 4.0 / 12, 6.0 / 12, 2.0 / 12, 3.0 / 12)
FP4 = (*_FP4, *(0.0 - value for value in _FP4))  # no −0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_E2M1, *(-value for value in _E2M1))
CODEBOOKS = {"nf4": NF4, "fp4": FP4, "mxfp4": E2M1}
ONE_127TH = 7.874015718698502e-3  # rounded to fp32 when it is multiplied

Block = tuple[int, int]


class Parts(NamedTuple):
    """The tensors of a packed W [N, K], and its block."""

    shape: tuple[int, int]
    block: Block
    packed: Tensor
    scales: Tensor | None
    zeros: Tensor | None


class Layout(NamedTuple):
    """What the tensors of a format must be. A shape of None: the tensor must be absent."""

    packed_dtype: torch.dtype
    packed: tuple[int, ...]
    scale_dtypes: tuple[torch.dtype, ...] = ()
    scales: tuple[int, ...] | None = None
    zeros: tuple[int, ...] | None = None  # may always be absent


_LayoutOf = Callable[[tuple[int, int], Block], Layout]


class Format(NamedTuple):
    layout: _LayoutOf
    values: Callable[[Parts], Tensor]
    codes_in_block: int = 1  # K, and a block's columns, are multiples of this
    columns: int | None = None  # of a block, if there is no choice


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _grid(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    (N, K), (n, k) = shape, block
    return -(-N // n), -(-K // k)


def _spread(scales: Tensor, shape: tuple[int, int], block: Block) -> Tensor:
    """Each scale at every element of its block: [N, K] (or broadcast to it), fp32."""
    scales = scales.float()
    for dim in (0, 1):
        if scales.shape[dim] > 1:
            scales = scales.repeat_interleave(block[dim], dim)
            scales = scales.narrow(dim, 0, shape[dim])
    return scales


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _scaled(codes: Tensor, parts: Parts) -> Tensor:
    """codes [N, K] fp32, exact, times their scales: one rounding."""
    if parts.zeros is not None:
        codes = codes - _spread(parts.zeros, parts.shape, parts.block)
    return codes * _spread(_required(parts.scales), parts.shape, parts.block)


def _int8_absmax(parts: Parts) -> Tensor:
    return parts.packed.float() * _required(parts.scales) * ONE_127TH


def unpack_halves(packed: Tensor) -> Tensor:
    """uint8 [..., 16 n] of *halves* → codes uint8 [..., 32 n]."""
    bytes_ = packed.unflatten(-1, (-1, HALVES // 2))
    return torch.cat([bytes_ & 15, bytes_ >> 4], dim=-1).flatten(-2)


def pack_halves(codes: Tensor) -> Tensor:
    """Codes uint8 [..., 32 n] → uint8 [..., 16 n]."""
    low, high = codes.unflatten(-1, (-1, 2, HALVES // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_pairs(packed: Tensor, *, high_first: bool) -> Tensor:
    """uint8 [..., n] of *pairs* → codes uint8 [..., 2 n]."""
    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return torch.stack(halves, dim=-1).flatten(-2)


def pack_pairs(codes: Tensor, *, high_first: bool) -> Tensor:
    """Codes uint8 [..., 2 n] → uint8 [..., n]."""
    first, second = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return first << 4 | second if high_first else first | second << 4


def _int4(parts: Parts) -> Tensor:
    codes = unpack_halves(parts.packed).float()
    return _scaled(codes if parts.zeros is not None else codes - 8.0, parts)


def codebook(name: str, device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOKS[name], dtype=torch.float32, device=device)


def _looked_up(name: str, codes: Tensor) -> Tensor:
    return codebook(name, codes.device)[codes.int()]


def _blockwise(name: str) -> Callable[[Parts], Tensor]:
    """bitsandbytes' 4 bits: the blocks run through all of W's elements in a row, whatever K is."""

    def values(parts: Parts) -> Tensor:
        (N, K), group = parts.shape, parts.block[1]
        found = _looked_up(name, unpack_pairs(parts.packed, high_first=True))[: N * K]
        scales = _required(parts.scales).repeat_interleave(group)[: N * K]
        return (found * scales).view(N, K)

    return values


def _mxfp4(parts: Parts) -> Tensor:
    exponents = _required(parts.scales).int()
    scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents - 127)
    scales = torch.where(exponents == 255, torch.full_like(scales, float("nan")), scales)
    found = _looked_up("mxfp4", unpack_pairs(parts.packed, high_first=False))
    return _scaled(found, parts._replace(scales=scales))


def _gguf_blocks(parts: Parts) -> tuple[Tensor, Tensor]:
    """The blocks' scales [N, K / 32, 1] as fp32, and their bytes after the scale."""
    N, K = parts.shape
    blocks = parts.packed.view(N, K // 32, -1)
    return blocks[..., :2].contiguous().view(torch.float16).float(), blocks[..., 2:]


def _q8_0(parts: Parts) -> Tensor:
    scales, codes = _gguf_blocks(parts)
    return (codes.contiguous().view(torch.int8).float() * scales).view(parts.shape)


def _q4_0(parts: Parts) -> Tensor:
    scales, packed = _gguf_blocks(parts)
    return ((unpack_halves(packed).float() - 8.0) * scales).view(parts.shape)


def _of_rows(
    dtype: torch.dtype, bytes_of_32: int, scale_dtypes: tuple[torch.dtype, ...] = _FLOATS, *, zeros: bool = False
) -> _LayoutOf:
    """[N, …] with `bytes_of_32` bytes for 32 elements, and a scale a block; zeros: a block may have one too."""

    def layout(shape: tuple[int, int], block: Block) -> Layout:
        grid = _grid(shape, block)
        return Layout(dtype, (shape[0], shape[1] * bytes_of_32 // 32), scale_dtypes, grid, grid if zeros else None)

    return layout


def _of_elements(shape: tuple[int, int], block: Block) -> Layout:
    elements = shape[0] * shape[1]
    return Layout(torch.uint8, (-(-elements // 2),), (torch.float32,), (-(-elements // block[1]),))


def _of_blocks(bytes_: int) -> _LayoutOf:
    return lambda shape, block: Layout(torch.uint8, (shape[0], shape[1] // 32 * bytes_))


FORMATS = {
    "int8": Format(_of_rows(torch.int8, 32), lambda parts: _scaled(parts.packed.float(), parts)),
    "int8_absmax": Format(_of_rows(torch.int8, 32, (torch.float32,)), _int8_absmax),
    "int4": Format(_of_rows(torch.uint8, 16, zeros=True), _int4, codes_in_block=HALVES),
    "nf4": Format(_of_elements, _blockwise("nf4")),
    "fp4": Format(_of_elements, _blockwise("fp4")),
    "fp8_e4m3": Format(
        _of_rows(torch.float8_e4m3fn, 32, (torch.float32,)), lambda parts: _scaled(parts.packed.float(), parts)
    ),
    "mxfp4": Format(_of_rows(torch.uint8, 16, (torch.uint8,)), _mxfp4, codes_in_block=32, columns=32),
    "q8_0": Format(_of_blocks(34), _q8_0, codes_in_block=32, columns=32),
    "q4_0": Format(_of_blocks(18), _q4_0, codes_in_block=32, columns=32),
}
