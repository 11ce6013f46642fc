"""Tile sizes: pure functions of a call's form and the target. Nothing here is measured on a GPU yet; it is argued.

A target is a CUDA compute capability (80, 90, …), "hip", or "interpreter". Few shapes are told apart, so that few
variants are compiled: three heights of the base tile (decode, a small batch, prefill) for each kind of factor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Shared memory a block may have, in bytes. Other members of a family are served by its smallest.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
# wgmma and tcgen05 read their factors from shared memory, so that wide tiles leave registers for the epilogue.
_FACTORS_IN_SHARED = (90, 100, 103, 110)
_PROCESSORS = 128  # as many blocks as should at least run at once: the order of an A100 (108) or an H100 (132)


class Expand(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    BY_ROW: bool
    num_warps: int
    num_stages: int


class Shrink(NamedTuple):
    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Merge(NamedTuple):
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int


def shared_memory(target: int | str) -> int:
    """Bytes of shared memory that one block may use."""
    if isinstance(target, str):
        return 64 * 1024  # CDNA's LDS; the interpreter has no limit
    return _SHARED.get(target, 99) * 1024


def options(target: int | str) -> dict[str, int | bool]:
    """What every launch tells the compiler."""
    if target == "interpreter":
        return {}
    fused = {"enable_fp_fusion": True}  # said aloud, since Triton's default differs between 3.9 and 3.10
    # Left alone, ptxas spills in order to fit one more block on a processor; told 255, it spills where it needs 184.
    return fused if target == "hip" else {**fused, "maxnreg": 248}


def exact_options(target: int | str) -> dict[str, int | bool]:
    """For merge, whose every rounding is specified: no product may be contracted with a sum.

    128 registers, so that two of its blocks of 256 threads share a processor.
    """
    if target == "interpreter":
        return {}
    return {**options(target), "enable_fp_fusion": False, **({} if target == "hip" else {"maxnreg": 128})}


def expand(
    M: int, many: bool, wide: bool, x_dtype: torch.dtype, weight_dtype: torch.dtype, target: int | str
) -> Expand:
    """The base tile. wide: x and W can be loaded 16 bytes at a time, and so go around the registers.

    `by row` (see `lora_linear`) reads a tile of B for the rows of the block: only small tiles have the registers.
    """
    if target == "interpreter":
        block = Expand(16, 32, 32, 2, True, 4, 1)
    elif not wide or x_dtype != weight_dtype:
        # single loads, an address for each, and factors cut into terms live in registers
        block = Expand(64, 32, 32, 8, True, 8, 3)
    elif x_dtype == weight_dtype == torch.float32:
        block = Expand(16, 64, 64, 8, True, 4, 4) if M <= 16 else Expand(64, 64, 32, 8, True, 8, 3)
    elif M <= 16:
        block = Expand(16, 64, 128, 8, True, 4, 4)
    elif M <= 64 or (many and M <= 256):
        block = Expand(64, 32, 128, 8, True, 4, 4)
    elif target in _FACTORS_IN_SHARED and not many:
        block = Expand(128, 256, 64, 8, False, 8, 4)
    else:
        block = Expand(128, 128, 64 if shared_memory(target) > 100 * 1024 else 32, 8, False, 8, 4)
    stage = block.BLOCK_K * (block.BLOCK_M * x_dtype.itemsize + block.BLOCK_N * weight_dtype.itemsize)
    return block._replace(num_stages=_stages(block.num_stages, stage, target), BY_ROW=many and block.BY_ROW)


def shrink(
    M: int, many: bool, wide: bool, x_dtype: torch.dtype, adapter_dtype: torch.dtype, target: int | str
) -> Shrink:
    """The tile of x that meets one page of 16 ranks. wide: x can be loaded 16 bytes at a time.

    many: by row, 256 threads have 16 products each.
    """
    if target == "interpreter":
        return Shrink(16, 32, 4, 1)
    # single loads, fp32 products and factors cut into terms live in registers
    direct = wide and x_dtype == adapter_dtype and x_dtype != torch.float32
    warps = 8 if many and target != "hip" else 4  # AMD's have 64 threads
    block = Shrink(32 if direct and M > 1024 else 16, 128 if direct else 64 if wide else 32, warps, 4)
    stage = block.BLOCK_K * (block.BLOCK_M * x_dtype.itemsize + 16 * adapter_dtype.itemsize)
    return block._replace(num_stages=_stages(block.num_stages, stage, target))


def merge(target: int | str) -> Merge:
    """A tile of W: 8 chains a thread. With 16 of them 128 registers (`exact_options`) do not suffice."""
    return Merge(32, 64, 4 if isinstance(target, str) else 8)  # AMD's warps have 64 threads


def splits(M: int, K: int, z_width: int, block: Shrink) -> int:
    """Into how many ranges K is cut so that shrink fills the processors. The sums are added in order by expand."""
    blocks = -(-M // block.BLOCK_M) * (z_width // 16)
    at_most = max(K // (4 * block.BLOCK_K), 1)
    return min(max(_PROCESSORS // blocks, 1), at_most, 16)


def _stages(wanted: int, bytes_per_stage: int, target: int | str) -> int:
    """As many loads in flight as fit, with 8 KiB left for the epilogue. AMD's pipeliner keeps one in registers."""
    fit = (shared_memory(target) - 8 * 1024) // bytes_per_stage
    return max(min(wanted, 2 if target == "hip" else wanted, fit), 1)
