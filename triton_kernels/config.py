"""The shipped table of launch plans: tile sizes for each class of shapes and each family of targets.

Pure functions that measure nothing; no value has been measured on a GPU yet. `candidates` are the plans that
`peftk tune` may choose instead (`tuned`). The tests compile a sample of them and of the table, `make test-long` all. A
target is a CUDA compute capability (80, 90, …), "hip", or "interpreter". There are few classes of shapes, so that few
variants are compiled.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from . import waves

# Shared memory that a block may use, in KiB, by compute capability; 99 for any other.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
# wgmma and tcgen05 read their factors from shared memory, so even wide tiles leave registers for the epilogue.
_FACTORS_IN_SHARED = (90, 100, 103, 110)
_TENSOR_MEMORY = (100, 103, 110)  # where products with at least 64 rows keep their accumulators in tensor memory
_PROCESSORS = 128  # about as many as an A100 (108) or an H100 (132) has


class CallShape(NamedTuple):
    """Everything about a call that its plan depends on: shapes, dtypes and flags, but no values."""

    M: int
    N: int
    K: int
    many: bool
    packed: bool
    backward: bool
    wide: bool  # x and W can be loaded 16 bytes at a time, so their loads bypass the registers
    x: torch.dtype
    weight: torch.dtype
    adapters: torch.dtype
    own_sums: bool  # the adapters' terms have separate sums (dropout in the backward)
    z_pages: int
    identity: bool = False  # for W: a series adapter

    def shape_class(self) -> ShapeClass:
        return ShapeClass(next(rows for rows in ROW_LIMITS if rows >= self.M or rows == ROW_LIMITS[-1]), *self[3:11])


ROW_LIMITS = (16, 64, 128, 256, 1024, 4096)  # the largest M of each class; the last class also has all larger M


class ShapeClass(NamedTuple):
    """A class of calls that share a plan: `CallShape` without N, K and z_pages, and with M rounded up to ROW_LIMITS."""

    rows: int
    many: bool
    packed: bool
    backward: bool
    wide: bool
    x: torch.dtype
    weight: torch.dtype
    adapters: torch.dtype
    own_sums: bool

    def key(self, size: tuple[int, int] | None = None) -> str:
        """The key of a tuned plan in the cache file. size: the N and K that it is for; None: for any."""
        words = ["packed" if self.packed else "many" if self.many else "one"]
        words += [word for word, present in (("backward", self.backward), ("dropout", self.own_sums)) if present]
        words += [str(dtype).removeprefix("torch.") for dtype in (self.x, self.weight, self.adapters)]
        of_size = [] if size is None else [f"N={size[0]} K={size[1]}"]
        return " ".join([*words, *([] if self.wide else ["narrow"]), f"M={self.rows}", *of_size])


class Layer(NamedTuple):
    """A layer whose calls are measured: W [N, K] and x in `dtype`, one or many adapters with their factors."""

    N: int
    K: int
    dtype: torch.dtype
    factors: torch.dtype
    many: bool


class Plan(NamedTuple):
    """How a call is launched. A shrink tile has SHRINK_M rows and SHRINK_R ranks; BLOCK_M is a multiple of SHRINK_M."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    BY_ROW: bool
    SHRINK_M: int
    SHRINK_K: int
    SHRINK_R: int
    SHRINK_STEP: int  # step in K where the shrink works by row
    num_warps: int
    num_stages: int
    shrink_splits: int = 1
    expand_splits: int = 1
    once: bool = True  # a single launch; False: one for shrink, then one for expand
    overlap: bool = False  # of two launches, the second may begin while the first one runs: sm_90 and later
    descriptors: bool = False  # x and W by tensor descriptors (TMA)
    per_processor: int = 0  # persistent blocks per processor, which draw tile after tile; 0: one block per tile
    fill: int = 128  # the least number of blocks that should run at once: about the processors of an A100
    shrink_warps: int = 4  # of a block of a launch of shrink tiles alone

    def compiled(self, part: str = "both") -> dict[str, int | bool]:
        """The constexpr arguments and compiler options: the fields BLOCK_M … num_stages. part: as the kernel's PART."""
        fields = dict(zip(self._fields[:11], self[:11], strict=True))
        return {**fields, "num_warps": self.shrink_warps, "num_stages": 3} if part == "shrink" else fields

    def shrinks_together(self) -> int:
        """How many blocks with a shrink tile share a multiprocessor: one beside a product's registers."""
        return 1 if self.once else _SHRINK_WARPS // self.shrink_warps


# A launch of shrink tiles alone has small blocks, of which a multiprocessor holds several: 16 warps of 128 registers.
_SHRINK_WARPS, _SHRINK_REGISTERS = 16, 128


class Wgrad(NamedTuple):
    """The tile of a gradient: PAGES · 16 ranks by BLOCK_C columns, in steps of BLOCK_R rows."""

    BLOCK_R: int
    BLOCK_C: int
    PAGES: int
    num_warps: int
    num_stages: int


class Merge(NamedTuple):
    """The tile of W that one block of merge owns."""

    BLOCK_N: int
    BLOCK_K: int
    num_warps: int


def shared_memory(target: int | str) -> int:
    """Bytes of shared memory that one block may use."""
    if isinstance(target, str):
        return 64 * 1024  # CDNA's LDS; the interpreter has no limit
    return _SHARED.get(target, 99) * 1024


def options(target: int | str) -> dict[str, int | bool]:
    """The compiler options of every launch but merge's."""
    if target == "interpreter":
        return {}
    fused = {"enable_fp_fusion": True}  # explicit, since Triton's default differs between 3.9 and 3.10
    # Without maxnreg, ptxas spills a few words to fit one more block on a processor. With it, ptxas spills when it is
    # too close to the limit, so the best limit depends on the version.
    return fused if target == "hip" else {**fused, "maxnreg": _most_registers()}


def launch_options(target: int | str, part: str, overlap: bool) -> dict[str, int | bool]:
    """`options` of one launch of lora_linear. overlap: it is one of two that may run at the same time."""
    if part == "shrink" and isinstance(target, int):
        return {**options(target), "maxnreg": _SHRINK_REGISTERS}
    return {**options(target), **({"launch_pdl": True} if overlap and part == "expand" else {})}


@functools.cache
def _most_registers() -> int:
    import triton  # here, so that plans can be counted where triton is not installed

    return 252 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 255


def exact_options(target: int | str) -> dict[str, int | bool]:
    """The compiler options of merge. All of its roundings are specified, so no product may be contracted with a sum.

    128 registers, so that two of its blocks of 256 threads share a processor.
    """
    if target == "interpreter":
        return {}
    return {**options(target), "enable_fp_fusion": False, **({} if target == "hip" else {"maxnreg": 128})}


@functools.lru_cache(maxsize=4096)  # every launch asks
def lora_linear(call: CallShape, target: int | str) -> Plan:
    """The shipped plan of a call, with its splits."""
    plans = (with_splits(plan, call, target) for plan in shipped_plans(call.shape_class(), target))
    return min(plans, key=lambda plan: _modelled_us(plan, call, target))  # the first where several are as fast


def _modelled_us(plan: Plan, call: CallShape, target: int | str) -> float:
    tiles = waves.Tiles(plan.BLOCK_M, plan.BLOCK_N, plan.expand_splits)
    product_us = waves.product_us(waves.Product(call.M, call.N, call.K), tiles, waves.machine(target))
    # a second launch, which reads x once more, must be worth it
    return shrink_us(call, plan, target) + gap_us(plan) + product_us * (1.0 if plan.once else 1.03)


def shrink_us(call: CallShape, plan: Plan, target: int | str) -> float:
    """How long a call's shrink tiles keep the product waiting, by `waves`."""
    terms = 1 if call.adapters == call.x else 3
    shrink = waves.Shrink(call.M, call.K, call.z_pages * 16, call.adapters.itemsize, terms, plan.shrinks_together())
    return waves.shrink_us(shrink, waves.Tiles(plan.SHRINK_M, plan.SHRINK_R, plan.shrink_splits), waves.machine(target))


def gap_us(plan: Plan) -> float:
    """Between the launches of a plan, by `waves`."""
    return 0.0 if plan.once else waves.OVERLAP_US if plan.overlap else waves.GAP_US


@functools.lru_cache(maxsize=4096)
def with_splits(plan: Plan, call: CallShape, target: int | str) -> Plan:
    """The plan of a shape class, with the splits of K and the ranks per shrink tile that this call needs.

    `once` needs shrink and expand tiles.
    """
    plan = _with_ranks(plan, call, target)
    shrink = -(-call.M // plan.SHRINK_M) * -(-call.z_pages * 16 // plan.SHRINK_R)
    expand = -(-call.M // plan.BLOCK_M) * -(-call.N // plan.BLOCK_N)
    return plan._replace(
        shrink_splits=_splits(shrink, call.K, plan.SHRINK_K, 16, plan.fill * plan.shrinks_together()),
        expand_splits=_expand_splits(expand, call, plan, target),
        once=plan.once and shrink > 0 and expand > 0,
    )


def _with_ranks(plan: Plan, call: CallShape, target: int | str) -> Plan:
    """One adapter of more than 16 ranks: more of them in a shrink tile, so that x is read fewer times."""
    interpreted = target == "interpreter"
    registers = not plan.once or call.x == call.adapters or interpreted  # terms need them, and so does the product
    if call.many or call.z_pages <= 1 or not registers or (call.x == torch.float32 and not interpreted):
        return plan
    ranks = 32 if call.z_pages == 2 or interpreted else 64
    warps = 8 if ranks > 32 else 4
    return _limit_stages(plan._replace(SHRINK_R=ranks, shrink_warps=warps), call.shape_class(), target)


def _by_waves(shape: ShapeClass, target: int | str) -> bool:
    """Whether `waves` models the product: 65 to 1,024 rows in 16 bits, on NVIDIA's tensor cores."""
    return 64 < shape.rows <= 1024 and not isinstance(target, str) and shape.x == shape.weight != torch.float32


@functools.cache
def shipped_plans(shape: ShapeClass, target: int | str) -> tuple[Plan, ...]:
    """The table's plan first; from 65 to 1,024 rows also smaller tiles, among which M, N and K decide."""
    first = shipped_plan(shape, target)
    beside = _overlapped(first, shape, target)
    if not _by_waves(shape, target) or isinstance(target, str):
        return (first, *beside)
    if not shape.wide or shape.own_sums or shape.packed or (shape.many and shape.adapters != shape.x):
        return (first, *beside)
    tma, block_k = target >= 90, 32 if shared_memory(target) <= 100 * 1024 else 64
    wide = [(64, 256, 8)] if target in _FACTORS_IN_SHARED else []
    # many: "by row" takes registers, so twice the threads; without it, 64 adapters in a tile would be 64 dots
    tiles = [(64, 128, 8)] if shape.many else [(64, 128, 4), *wide, (128, 128, 8)]
    others = (
        first._replace(
            BLOCK_M=M, BLOCK_N=N, BLOCK_K=block_k, BY_ROW=shape.many, num_warps=warps, num_stages=4, descriptors=tma
        )
        for M, N, warps in tiles
    )
    plans = [first, *(_limit_stages(plan, shape, target) for plan in others)]
    return tuple(dict.fromkeys([*plans, *(both for plan in plans for both in _overlapped(plan, shape, target))]))


def can_overlap(target: int | str) -> bool:
    """Whether a launch can begin while the one before it runs. The interpreter runs them one after the other."""
    return target == "interpreter" or (isinstance(target, int) and target >= 90)


def launched(call: CallShape, target: int | str, *, overlap: bool) -> Plan:
    """The fastest of the shipped plans that overlap, or of those that do not, with its splits.

    overlap: if none does, the table's plan in two launches; the target `can_overlap`.
    """
    shape = call.shape_class()
    plans = [plan for plan in shipped_plans(shape, target) if plan.overlap == overlap]
    plans = plans or [_apart(shipped_plan(shape, target), shape)._replace(overlap=True)]
    return min((with_splits(plan, call, target) for plan in plans), key=lambda plan: _modelled_us(plan, call, target))


def _shrinks_alone(shape: ShapeClass, target: int | str) -> bool:
    """Whether a launch of shrink tiles alone has enough registers for the products of fp32 factors' terms."""
    if shape.adapters == shape.x or not isinstance(target, int):
        return True
    tight = shape.many + (shape.x == torch.float16)  # each takes registers; one of them fits into a forward on sm_90
    return tight == 0 or (tight == 1 and target == 90 and not shape.backward)


def _apart(plan: Plan, shape: ShapeClass) -> Plan:
    """The plan in two launches. With many adapters, the shrink by row needs more threads for its registers."""
    return plan._replace(once=False, **({"SHRINK_M": 16, "shrink_warps": 8} if shape.many else {}))


def _overlapped(plan: Plan, shape: ShapeClass, target: int | str) -> tuple[Plan, ...]:
    """The plan in two launches, the second of which begins while the first runs, where the GPU can do that.

    Without the shrink's code there are registers for wider tiles. With few rows, a second launch costs too much.
    """
    if isinstance(target, str) or not can_overlap(target) or shape.rows <= 64 or shape.x == torch.float32:
        return ()
    if not _shrinks_alone(shape, target):
        return ()
    plans = [_apart(plan, shape)._replace(overlap=True)]
    if shape.many:
        return tuple(plans)
    if target in _FACTORS_IN_SHARED and plan[:2] == (128, 128) and shape.wide and not shape.own_sums:
        plans += [plans[0]._replace(BLOCK_N=256, num_stages=4)]
    return tuple(_limit_stages(each, shape, target) for each in plans)


@functools.cache
def shipped_plan(shape: ShapeClass, target: int | str) -> Plan:
    """The table's plan for a class of shapes. "By row" (see `lora_linear`) only has enough registers in small tiles."""
    plan = _tiles(shape, target)
    return _limit_stages(plan._replace(BY_ROW=shape.many and plan.BY_ROW), shape, target)


def _limit_stages(plan: Plan, shape: ShapeClass, target: int | str) -> Plan:
    stage = plan.BLOCK_K * (plan.BLOCK_M * shape.x.itemsize + plan.BLOCK_N * shape.weight.itemsize)
    if plan.once:
        stage = max(stage, plan.SHRINK_K * (plan.SHRINK_M * shape.x.itemsize + plan.SHRINK_R * shape.adapters.itemsize))
    return plan._replace(num_stages=_stages_that_fit(plan.num_stages, stage, target))


def candidates(shape: ShapeClass, target: int | str, *, few: bool = False) -> tuple[Plan, ...]:
    """The plans that the tuner may choose from: the shipped ones first, then some that differ in a field or two.

    few: the shipped ones and the first in two launches. Compiling is what takes the tuner's time.
    """
    first, *shipped = shipped_plans(shape, target)
    if target == "interpreter":
        return first, first._replace(once=False), first._replace(BLOCK_N=16)
    if target == "hip" and first.BLOCK_M == 16 and shape.many and shape.backward:
        return (first,)  # all others run out of registers
    apart = [_apart(first, shape)] if _shrinks_alone(shape, target) else []
    if few:
        return first, *shipped, *apart
    other: list[dict[str, Any]] = []
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
    plans = [first, *shipped, *apart]
    plans += [_limit_stages(first._replace(**fields), shape, target) for fields in other]
    return tuple(dict.fromkeys(plans))


def _tiles(shape: ShapeClass, target: int | str) -> Plan:
    M, many, wide, x, weight = shape.rows, shape.many, shape.wide, shape.x, shape.weight
    if target == "interpreter":
        return Plan(16, 32, 32, 2, True, 16, 32, 16, 16, 4, 1)
    # not direct: single loads, fp32 products and factors split into terms use registers
    direct = wide and x == shape.adapters and x != torch.float32
    shrink_k = 128 if direct else 64 if wide and not many else 32
    few_warps = 8 if many and shape.backward else 4  # reading B by row takes many registers, whatever its layout
    if not wide or x != weight:
        return Plan(64, 32, 32, 8, True, 16, shrink_k, 16, 16, 8, 3)
    if x == torch.float32:
        if M <= 16:
            return Plan(16, 64, 64, 8, True, 16, shrink_k, 16, 8, few_warps, 4)
        return Plan(64, 64, 32, 8, True, 16, shrink_k, 16, 16, 8, 3)
    if M <= 16:
        if target == "hip":  # loads in flight use registers
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
    """The number of splits of K, so that the tiles fill the processors."""
    return max(min(fill // max(tiles, 1), K // (4 * block_k), at_most), 1)


def _expand_splits(tiles: int, call: CallShape, plan: Plan, target: int | str) -> int:
    """For few tokens: W is read by more blocks at once. The fp32 parts of y stay below a sixteenth of W's bytes.

    From 65 to 1,024 rows: as many as make the waves of tiles the shortest, by `waves`, whose parts stay below an eighth
    of the bytes of x, W and y (a tenth in the backward, whose second launch has parts of its own).
    """
    if not tiles or call.identity:  # W = identity is no sum: each part would add x
        return 1
    if _by_waves(call.shape_class(), target) and plan.BLOCK_M >= 64:
        compulsory = call.x.itemsize * (call.M * call.K + call.N * call.K + call.M * call.N)
        room = compulsory // (10 if call.backward else 8)
        possible = [
            splits
            for splits in waves.SPLITS
            if splits == 1 or (call.K // splits >= 4 * plan.BLOCK_K and 4 * splits * call.M * call.N <= room)
        ]
        return min(possible, key=lambda splits: _modelled_us(plan._replace(expand_splits=splits), call, target))
    if plan.BLOCK_M > 64:
        return 1
    cheap = call.K * call.weight.itemsize // (16 * 4 * call.M)
    return min(_splits(tiles, call.K, plan.BLOCK_K, 8, plan.fill), max(cheap, 1))


def wgrad_pages(rank: int, x_dtype: torch.dtype, target: int | str) -> int:
    """Pages of ranks in one tile of a gradient, given the largest rank. x and dY are read once for all of them."""
    if target == "interpreter":
        return 1 if rank <= 16 else 2
    if rank <= 16:
        return 1
    if x_dtype == torch.float16 and target in _TENSOR_MEMORY:
        return 2  # with 64 ranks, the 6 products of fp16 need more accumulators than tensor memory holds
    return 2 if x_dtype == torch.float32 else 4


def wgrad(pages: int, many: bool, wide: bool, x_dtype: torch.dtype, target: int | str) -> Wgrad:
    """The shipped tile of a gradient.

    wide: x and dY can be loaded 16 bytes at a time. many: rows are gathered, and the loads of their indices take some
    of the pipeline's stages.
    """
    if target == "interpreter":
        return Wgrad(16, 32, pages, 4, 1)
    # fp32 products without tensor cores hold the factors of a whole step of rows in registers; so do the terms of fp16
    tight = x_dtype == torch.float16 and pages > 1 and shared_memory(target) <= 100 * 1024
    rows = 16 if x_dtype == torch.float32 or tight else 32
    if not wide:
        return Wgrad(rows, 64, pages, 4, 2)
    block = Wgrad(rows, 128, pages, 4 if pages == 1 else 8, 6 if many else 4)
    stage = block.BLOCK_R * (16 * pages * 4 + block.BLOCK_C * x_dtype.itemsize)
    return block._replace(num_stages=_stages_that_fit(block.num_stages, stage, target))


def merge(target: int | str) -> Merge:
    """A tile of W. A thread has 8 chains of fma: 16 of them need more than the 128 registers of `exact_options`."""
    return Merge(32, 64, 4 if isinstance(target, str) else 8)  # AMD's warps have 64 threads


def wgrad_candidates(pages: int, many: bool, wide: bool, x_dtype: torch.dtype, target: int | str) -> tuple[Wgrad, ...]:
    """Like `candidates`, for `wgrad`. PAGES stays the same, since the layout of the gradients depends on it."""
    first = wgrad(pages, many, wide, x_dtype, target)
    if target == "interpreter":
        return first, first._replace(BLOCK_C=16)
    fewer = first._replace(num_stages=max(first.num_stages - 1, 1))
    return tuple(dict.fromkeys([first, fewer, first._replace(BLOCK_C=64), first._replace(BLOCK_R=16)]))


def wgrad_range(M: int, heads: int, groups: int, blocks: int, block: Wgrad) -> int:
    """The rows of a range: a longer segment is cut into several, so that a single long one fills the processors.

    heads: pieces of ranks of all adapters; groups: the most pieces of one adapter; blocks: of columns. A range has at
    least four steps. There are at most 16 ranges and 64 MiB of partial sums, fewer bytes than 16-bit x and dY have.
    """
    tile = (block.PAGES * 16 + 1) * block.BLOCK_C * 4
    wanted = -(-4 * _PROCESSORS // max(blocks, 1))
    fit = (64 << 20) // max(2 * groups * blocks * tile, 1)
    cheap = 2 * M // max(4 * groups * (block.PAGES * 16 + 1), 1)
    ranges = max(min(wanted, fit, cheap, 16, M // (4 * block.BLOCK_R)), 1)
    steps = -(-M // (ranges * block.BLOCK_R))
    return max(steps, 1) * block.BLOCK_R


def _stages_that_fit(wanted: int, bytes_per_stage: int, target: int | str) -> int:
    """`wanted` pipeline stages, or as many as fit with 8 KiB left for the epilogue. AMD: at most 2."""
    fit = (shared_memory(target) - 8 * 1024) // bytes_per_stage
    return max(min(wanted, 2 if target == "hip" else wanted, fit), 1)
