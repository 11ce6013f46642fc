"""Our kernel, or a library's product with the adapters added in place: which is faster, as `waves` models it.

The default until `peftk tune` has measured. Every time here is *modelled*.
"""

from __future__ import annotations

import torch

from . import config, waves

_FEW_FP32_ROWS = 64  # up to which reading W takes longer than fp32 products without tensor cores


def ours_us(call: config.CallShape, target: int | str) -> float:
    """Shrink tiles in front of the product's tiles, in one launch or two that overlap."""
    plan, gpu = config.lora_linear(call, target), waves.machine(target)
    tiles = waves.Tiles(plan.BLOCK_M, plan.BLOCK_N, plan.expand_splits)
    product = waves.Product(call.M, call.N, call.K)
    shrink_us = config.shrink_us(call, plan, target) + config.gap_us(plan)
    return shrink_us + waves.triton_us(product, tiles, gpu)


def library_us(call: config.CallShape, target: int | str) -> float:
    """The library's product, then one launch of ours: shrink, and y += v Bᵀ."""
    plan, gpu = config.lora_linear(call._replace(identity=True), target), waves.machine(target)
    product = waves.Product(call.M, call.N, call.K)
    on_top = (
        config.shrink_us(call, plan, target)
        + config.gap_us(plan)
        + waves.expand_in_place_us(product, call.z_pages * 16, gpu)
    )
    return waves.library_us(product, gpu) + (waves.GAP_US + on_top if call.z_pages else 0.0)


def prefer_library(call: config.CallShape, target: int | str, margin: float) -> tuple[bool, str]:
    """Whether the library is ahead by `margin`, and why."""
    if call.x == torch.float32:
        if call.M > _FEW_FP32_ROWS:
            return True, "modelled: our fp32 products use no tensor cores"
        return False, "modelled: for few fp32 rows, reading W takes the time"
    ours, library = ours_us(call, target), library_us(call, target)
    return ours >= margin * library, f"modelled: our kernel {ours:.1f} µs, torch's GEMM first {library:.1f} µs"
