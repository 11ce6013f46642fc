"""A model of the time of a product on a GPU, for choices that nobody has measured. Every time here is *modelled*.

    time = max(waves · time of a tile, bytes / bandwidth)

A product of [M, K] by [K, N] is cut into tiles, and K into splits; the tiles run in waves of as many blocks as the GPU
has multiprocessors. The last wave is as long as the others, however few tiles it has: that is what makes a large tile
slow between 65 and 1,024 rows. `peftk tune` measures instead.

Sources of the numbers: NVIDIA's data sheets of A100, A40, L40S, H100 SXM, B200 and RTX PRO 6000 (dense 16-bit
products, fp32 accumulators). The efficiencies, TRITON, GAP_US and OVERLAP_US are assumptions, to be replaced by
measurements.
"""

from __future__ import annotations

from typing import NamedTuple


class Machine(NamedTuple):
    processors: int
    flops_per_us: float  # of the tensor cores, all processors together
    bytes_per_us: float  # of the memory


_MACHINES = {
    80: Machine(108, 312e6, 2.04e6),
    86: Machine(84, 150e6, 0.7e6),
    89: Machine(142, 362e6, 0.86e6),
    90: Machine(132, 989.5e6, 3.35e6),
    100: Machine(148, 2250e6, 8.0e6),
    120: Machine(188, 500e6, 1.79e6),
}

GAP_US = 2.0  # between two launches of one stream, outside of a CUDA graph
OVERLAP_US = 1.0  # until the second launch goes on, where it waits for the end of the first inside of its blocks
TRITON = 1.1  # a Triton product over a library's in the same tiles
# The share of the peak that a full wave of tiles reaches: small tiles read their factors more often.
EFFICIENCY = {
    (128, 256): 0.80,
    (256, 128): 0.80,
    (128, 128): 0.70,
    (64, 256): 0.65,
    (64, 128): 0.55,
    (128, 64): 0.55,
    (64, 64): 0.40,
    (64, 32): 0.25,
    (16, 64): 0.10,
}
SPLITS = (1, 2, 4, 8)
_BYTES_PER_BLOCK_US = 43e3  # bytes per µs that one block streams: 64 KiB in flight at 1.5 µs latency
_SHRINK_EFFICIENCY = 0.3  # the share of the peak of products with 16 to 64 ranks


class Tiles(NamedTuple):
    """How a product is cut: tiles of BLOCK_M rows of x and BLOCK_N rows of W, and K into splits."""

    BLOCK_M: int
    BLOCK_N: int
    splits: int = 1


class Product(NamedTuple):
    """y [M, N] = x [M, K] Wᵀ in 16 bits."""

    M: int
    N: int
    K: int


def machine(target: int | str) -> Machine:
    """The GPU of a compute capability, or the nearest older one; an H100 for "hip" and "interpreter"."""
    if isinstance(target, str):
        return _MACHINES[90]
    return _MACHINES[max((each for each in _MACHINES if each <= target), default=80)]


def product_us(product: Product, tiles: Tiles, gpu: Machine) -> float:
    """x Wᵀ by one launch."""
    M, N, K = product
    blocks = -(-M // tiles.BLOCK_M) * -(-N // tiles.BLOCK_N) * tiles.splits
    flops = 2 * tiles.BLOCK_M * tiles.BLOCK_N * K / tiles.splits
    tile_us = flops * gpu.processors / (gpu.flops_per_us * EFFICIENCY.get(tiles[:2], 0.3))
    moved = 2 * (M * K + N * K + M * N)
    parts = 0 if tiles.splits == 1 else 8 * tiles.splits * M * N  # fp32, written and read
    return max(-(-blocks // gpu.processors) * tile_us, (moved + parts) / gpu.bytes_per_us)


def triton_us(product: Product, tiles: Tiles, gpu: Machine) -> float:
    """The same by a Triton kernel: above 64 rows slower than a library in the same tiles; below, reading W decides."""
    return product_us(product, tiles, gpu) * (TRITON if product.M > 64 else 1.0)


def library_us(product: Product, gpu: Machine) -> float:
    """x Wᵀ by a library that knows its best tile and split."""
    each = (Tiles(*tile, splits) for tile in EFFICIENCY for splits in SPLITS)
    return min(product_us(product, tiles, gpu) for tiles in each)


class Shrink(NamedTuple):
    """z [M, ranks] = x Aᵀ with 16-bit x: tiles of rows and ranks, and how the factor A is kept and multiplied."""

    M: int
    K: int
    ranks: int
    itemsize: int = 2  # of A
    terms: int = 1  # products of one element of x with one of A
    together: int = 1  # blocks that share a multiprocessor


def shrink_us(shrink: Shrink, tiles: Tiles, gpu: Machine) -> float:
    """Each block streams its rows of x and its ranks of A. No less than x's bytes, and than the products, take."""
    if not shrink.ranks:
        return 0.0
    M, K, ranks, itemsize, terms, together = shrink
    blocks = -(-M // tiles.BLOCK_M) * -(-ranks // tiles.BLOCK_N) * tiles.splits
    tile_us = (2 * tiles.BLOCK_M + itemsize * tiles.BLOCK_N) * K / tiles.splits / _BYTES_PER_BLOCK_US
    bytes_us = (2 * M + itemsize * ranks) * K / gpu.bytes_per_us
    products_us = 2 * M * K * ranks * terms / (gpu.flops_per_us * _SHRINK_EFFICIENCY)
    return max(-(-blocks // (together * gpu.processors)) * tile_us, bytes_us, products_us)


def expand_in_place_us(product: Product, ranks: int, gpu: Machine) -> float:
    """y += v Bᵀ: y is read and written once."""
    return (4 * product.M * product.N + 2 * ranks * product.N) / gpu.bytes_per_us if ranks else 0.0
