"""The shipped table: tile sizes by the shape class of a call, for each family of targets. Pure functions, no measuring.

Nothing here is measured on a GPU yet. `candidates` are the plans that `peftk tune` may choose instead (`tuned`); tests
compile a sample of them and of the table, `make test-matrix` all. A target is a CUDA compute capability (80, 90, …),
"hip", or "interpreter". Few shapes are told apart, so that few variants are compiled.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# Shared memory a block may have, in bytes. Other members of a family are served by its smallest.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
# wgmma and tcgen05 read their factors from shared memory, so that wide tiles leave registers for the epilogue.
_FACTORS_IN_SHARED = (90, 100, 103, 110)
_TENSOR_MEMORY = (100, 103, 110)  # where products of 64 rows and more have their accumulators
_PROCESSORS = 128  # the order of an A100 (108) or an H100 (132)


class Form(NamedTuple):
    """What a plan depends on: nothing about a call's values."""

    M: int
    N: int
    K: int
    many: bool
    packed: bool
    backward: bool
    wide: bool  # x and W can be loaded 16 bytes at a time, and so go around the registers
    x: torch.dtype
    weight: torch.dtype
    adapters: torch.dtype
    own_sums: bool  # the adapters' terms are summed apart (dropout in the backward)
    z_pages: int
    identity: bool = False  # for W: a series adapter

    def shape(self) -> Shape:
        return Shape(next(rows for rows in HEIGHTS if rows >= self.M or rows == HEIGHTS[-1]), *self[3:11])


HEIGHTS = (16, 64, 256, 1024, 4096)  # rows up to which calls are of one class, the last without an end


class Shape(NamedTuple):
    """The class of shapes that share a plan: `Form` without its sizes, of which only the height of M counts."""

    rows: int
    many: bool
    packed: bool
    backward: bool
    wide: bool
    x: torch.dtype
    weight: torch.dtype
    adapters: torch.dtype
    own_sums: bool

    def key(self) -> str:
        """What a tuned plan is kept under."""
        words = ["packed" if self.packed else "many" if self.many else "one"]
        words += [word for word, said in (("backward", self.backward), ("dropout", self.own_sums)) if said]
        words += [str(dtype).removeprefix("torch.") for dtype in (self.x, self.weight, self.adapters)]
        return " ".join([*words, *([] if self.wide else ["narrow"]), f"M={self.rows}"])


class Plan(NamedTuple):
    """How a call is launched. A tile of shrink has SHRINK_M rows, and SHRINK_R ranks; BLOCK_M is a multiple of it."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    BY_ROW: bool
    SHRINK_M: int
    SHRINK_K: int
    SHRINK_R: int
    SHRINK_STEP: int  # of K, by row
    num_warps: int
    num_stages: int
    shrink_splits: int = 1
    expand_splits: int = 1
    once: bool = True  # one launch; False: shrink, then expand
    descriptors: bool = False  # x and W by tensor descriptors (TMA)
    per_processor: int = 0  # blocks that stay on each processor and draw tile after tile; 0: a block for every tile
    fill: int = 128  # as many blocks as should at least run at once: the order of an A100 (108) or an H100 (132)

    def compiled(self) -> dict[str, int | bool]:
        """What the kernel is compiled for."""
        return dict(zip(self._fields[:11], self[:11], strict=True))


class Wgrad(NamedTuple):
    BLOCK_R: int
    BLOCK_C: int
    PAGES: int
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
    # Left alone, ptxas spills a few words in order to fit one more block on a processor. Told a limit, it spills where
    # it comes too close: no limit serves all versions.
    return fused if target == "hip" else {**fused, "maxnreg": _most_registers()}


@functools.cache
def _most_registers() -> int:
    import triton  # whoever only counts has none

    return 252 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 255


def exact_options(target: int | str) -> dict[str, int | bool]:
    """For merge, whose every rounding is specified: no product may be contracted with a sum.

    128 registers, so that two of its blocks of 256 threads share a processor.
    """
    if target == "interpreter":
        return {}
    return {**options(target), "enable_fp_fusion": False, **({} if target == "hip" else {"maxnreg": 128})}


def lora_linear(form: Form, target: int | str) -> Plan:
    """The shipped plan of a call."""
    return fitted(shipped(form.shape(), target), form)


def fitted(plan: Plan, form: Form) -> Plan:
    """The plan of a class of shapes, cut into the splits that this call needs."""
    shrink = -(-form.M // plan.SHRINK_M) * -(-form.z_pages * 16 // plan.SHRINK_R)
    expand = -(-form.M // plan.BLOCK_M) * -(-form.N // plan.BLOCK_N)
    return plan._replace(
        shrink_splits=_splits(shrink, form.K, plan.SHRINK_K, 16, plan.fill),
        expand_splits=_expand_splits(expand, form, plan),
        once=plan.once and shrink > 0 and expand > 0,
    )


@functools.cache
def shipped(shape: Shape, target: int | str) -> Plan:
    """The table's plan for a class of shapes. `by row` (see `lora_linear`) has the registers in small tiles only."""
    plan = _tiles(shape, target)
    return _staged(plan._replace(BY_ROW=shape.many and plan.BY_ROW), shape, target)


def _staged(plan: Plan, shape: Shape, target: int | str) -> Plan:
    stage = max(
        plan.BLOCK_K * (plan.BLOCK_M * shape.x.itemsize + plan.BLOCK_N * shape.weight.itemsize),
        plan.SHRINK_K * (plan.SHRINK_M * shape.x.itemsize + plan.SHRINK_R * shape.adapters.itemsize),
    )
    return plan._replace(num_stages=_stages(plan.num_stages, stage, target))


def candidates(shape: Shape, target: int | str) -> tuple[Plan, ...]:
    """The plans that a tuner may choose from, the shipped one first: each of them in one way unlike it."""
    first = shipped(shape, target)
    if target == "interpreter":
        return first, first._replace(once=False), first._replace(BLOCK_N=16)
    if target == "hip" and first.BLOCK_M == 16 and shape.many and shape.backward:
        return (first,)  # no other has the registers
    other = [{"once": False}]
    if first.num_stages > 2:
        other += [{"num_stages": first.num_stages - 1}]
    if first.descriptors:
        other += [{"descriptors": False}]
    if first.BLOCK_M <= 64:
        other += [{"fill": 64}, {"fill": 256}, {"fill": 0}, {"BLOCK_K": first.BLOCK_K // 2, "num_stages": 6}]
    if first.BLOCK_M > 16:
        other += [{"GROUP_M": 1}, {"GROUP_M": 16}]
    if first.BLOCK_N >= 128:
        other += [{"BLOCK_N": first.BLOCK_N // 2}]
    if first.BLOCK_M == 128 and first.BLOCK_N == 128:
        other += [{"per_processor": 1}, {"per_processor": 2}]
    plans = [first, *(_staged(first._replace(**fields), shape, target) for fields in other)]
    return tuple(dict.fromkeys(plans))


def _tiles(shape: Shape, target: int | str) -> Plan:
    M, many, wide, x, weight = shape.rows, shape.many, shape.wide, shape.x, shape.weight
    if target == "interpreter":
        return Plan(16, 32, 32, 2, True, 16, 32, 16, 16, 4, 1)
    # single loads, fp32 products and factors cut into terms live in registers
    direct = wide and x == shape.adapters and x != torch.float32
    shrink_k = 128 if direct else 64 if wide and not many else 32
    few_warps = 8 if many and shape.backward else 4  # B by row, in any layout, takes many registers
    if not wide or x != weight:
        return Plan(64, 32, 32, 8, True, 16, shrink_k, 16, 16, 8, 3)
    if x == torch.float32:
        if M <= 16:
            return Plan(16, 64, 64, 8, True, 16, shrink_k, 16, 8, few_warps, 4)
        return Plan(64, 64, 32, 8, True, 16, shrink_k, 16, 16, 8, 3)
    if M <= 16:
        if target == "hip":  # loads wait in registers
            return Plan(16, 64, 64, 8, True, 16, shrink_k, 16, 4, few_warps, 4)
        return Plan(16, 64, 128, 8, True, 16, shrink_k, 16, 8, few_warps, 4)
    if M <= 64 or (many and M <= 256):
        return Plan(64, 32, 128, 8, True, 16, shrink_k, 16, 8, 8 if shape.packed else 4, 4)
    shrink_m = 32 if direct and M > 1024 else 16
    tma = isinstance(target, int) and target >= 90
    if target in _FACTORS_IN_SHARED and direct and not many and not shape.own_sums:
        return Plan(128, 256, 64, 8, False, shrink_m, shrink_k, 16, 8, 8, 4, descriptors=tma)
    narrow = shared_memory(target) <= 100 * 1024
    block_n = 64 if many and (shape.own_sums or (shape.backward and not tma)) else 128
    return Plan(128, block_n, 32 if narrow else 64, 8, False, shrink_m, shrink_k, 16, 8, 8, 4, descriptors=tma)


def _splits(tiles: int, K: int, block_k: int, at_most: int, fill: int) -> int:
    """Into how many ranges K is cut so that the tiles fill the processors."""
    return max(min(fill // max(tiles, 1), K // (4 * block_k), at_most), 1)


def _expand_splits(tiles: int, form: Form, plan: Plan) -> int:
    """Few tokens: W is read by more blocks at once. The parts of y, fp32, stay below a sixteenth of W's bytes."""
    if plan.BLOCK_M > 64 or not tiles or form.identity:  # W = identity is no sum: each part would add x
        return 1
    cheap = form.K * form.weight.itemsize // (16 * 4 * form.M)
    return min(_splits(tiles, form.K, plan.BLOCK_K, 8, plan.fill), max(cheap, 1))


def wgrad_pages(rank: int, x_dtype: torch.dtype, target: int | str) -> int:
    """How many pages of ranks one tile of a gradient has, from the largest rank: x and dY are read once for them."""
    if target == "interpreter":
        return 1 if rank <= 16 else 2
    if rank <= 16:
        return 1
    if x_dtype == torch.float16 and target in _TENSOR_MEMORY:
        return 2  # of 64 ranks, the 6 products of fp16 would have more accumulators than fit there
    return 2 if x_dtype == torch.float32 else 4


def wgrad(pages: int, many: bool, wide: bool, x_dtype: torch.dtype, target: int | str) -> Wgrad:
    """The tile of a gradient, PAGES · 16 ranks by BLOCK_C columns, and the rows of a step.

    wide: x and dY can be loaded 16 bytes at a time. many: the loads of the rows' places take their share of the stages.
    """
    if target == "interpreter":
        return Wgrad(16, 32, pages, 4, 1)
    # fp32 products without tensor cores hold their factors in registers, a whole step of rows; so do the terms of fp16
    tight = x_dtype == torch.float16 and pages > 1 and shared_memory(target) <= 100 * 1024
    rows = 16 if x_dtype == torch.float32 or tight else 32
    if not wide:
        return Wgrad(rows, 64, pages, 4, 2)
    block = Wgrad(rows, 128, pages, 4 if pages == 1 else 8, 6 if many else 4)
    stage = block.BLOCK_R * (16 * pages * 4 + block.BLOCK_C * x_dtype.itemsize)
    return block._replace(num_stages=_stages(block.num_stages, stage, target))


def merge(target: int | str) -> Merge:
    """A tile of W: 8 chains a thread. With 16 of them 128 registers (`exact_options`) do not suffice."""
    return Merge(32, 64, 4 if isinstance(target, str) else 8)  # AMD's warps have 64 threads


def wgrad_candidates(pages: int, many: bool, wide: bool, x_dtype: torch.dtype, target: int | str) -> tuple[Wgrad, ...]:
    """As `candidates`. A tile's pages of ranks stay: how the gradients lie depends on them."""
    first = wgrad(pages, many, wide, x_dtype, target)
    if target == "interpreter":
        return first, first._replace(BLOCK_C=16)
    fewer = first._replace(num_stages=max(first.num_stages - 1, 1))
    return tuple(dict.fromkeys([first, fewer, first._replace(BLOCK_C=64), first._replace(BLOCK_R=16)]))


def wgrad_range(M: int, heads: int, groups: int, blocks: int, block: Wgrad) -> int:
    """Into ranges of how many rows a segment is cut at most, so that one long segment fills the processors.

    heads, groups: pieces of ranks of all adapters, and the most of one; blocks: of columns. At least four steps; at
    most 16 ranges, and 64 MiB of partial sums, which stay fewer than the bytes of 16-bit x and dY.
    """
    tile = (block.PAGES * 16 + 1) * block.BLOCK_C * 4
    wanted = -(-4 * _PROCESSORS // max(blocks, 1))
    fit = (64 << 20) // max(2 * groups * blocks * tile, 1)
    cheap = 2 * M // max(4 * groups * (block.PAGES * 16 + 1), 1)
    ranges = max(min(wanted, fit, cheap, 16, M // (4 * block.BLOCK_R)), 1)
    steps = -(-M // (ranges * block.BLOCK_R))
    return max(steps, 1) * block.BLOCK_R


def _stages(wanted: int, bytes_per_stage: int, target: int | str) -> int:
    """As many loads in flight as fit, with 8 KiB left for the epilogue. AMD's pipeliner keeps one in registers."""
    fit = (shared_memory(target) - 8 * 1024) // bytes_per_stage
    return max(min(wanted, 2 if target == "hip" else wanted, fit), 1)
