"""One linear layer with its adapters in one launch, forward and dX. `docs/lora_linear.md` derives it.

    shrink   z[m] = x̃[m] A_iᵀ + a_i                                      → fp32 [M, z_width]
    expand   y[m] = x[m] Wᵀ + bias + s_i · act(z[m]) B_iᵀ + β_i          the base GEMM; the adapter is its epilogue

The blocks of a launch draw tickets (`tickets`): the first are shrink tiles, all later ones expand tiles, which wait for
the z of their rows after the base product, when it has long been there. As two launches (ONCE = False: shrink tiles,
then expand tiles, numbered by the block) the same code needs no waiting; that is the plain form.

Backward, with the roles swapped: u[m] = (dY[m] B_i) ⊙ act'(z[m]) is the shrink, dX[m] = dY[m] W + mask/(1-p) ⊙
s_i · u[m] A_i the expand.

Rows are worked on in the order of their adapters (`segments`), so a block of rows meets few of them. A block goes
through its adapters one by one with dots over all its rows ("by segment"), or, where it meets so many that most of
those dots would be thrown away, gives every row its own products without dots ("by row"). Both read what an adapter is
from `peftk.adapters.table`: in device memory for many (MANY), in the kernel's arguments for one, so that a call with
one adapter copies nothing to the device. Packed outputs (PACKED) are slices of W's rows with adapters of their own, say
query, key and value. Ranks come 16 at a time, a page; no rank is a compile-time constant. Rows and ranks are selected,
never multiplied by zero: an adapter's inf stays with its own rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peftk.launch import workspace
from peftk.launch.adapter_args import NO_ADAPTER, AdapterArgs
from peftk.launch.segments import Segments

from . import config, philox, tuned
from .expand import expand_tile
from .segments import PAGE
from .shrink import shrink_tile
from .tickets import READY, draw, leave, publish
from .tuned import target

# Arguments that change between calls and would otherwise each compile again for 1, or for a multiple of 16.
_VARYING = ["one_A", "one_stride_A", "one_B", "one_stride_Bn", "one_stride_Br", "one_bias_A", "one_bias_B"]
_VARYING += ["one_rank", "one_activation", "one_scaling", "slice_count", "adapters", "M", "stride_pre", "z_pages"]
_VARYING += ["shrink_tiles", "expand_tiles", "shrink_splits", "expand_splits", "dense", "threshold", "keep_scale"]


@triton.jit(do_not_specialize=_VARYING)
def lora_linear_kernel(
    x, x_tiles, weight, bias, y, z, pre, shrink_partials, expand_partials, counters, seed,
    order, ids, starts, owners, blocks, pages, rows, scaling, biases, slices,
    one_A: tl.int64, one_stride_A: tl.int64, one_B: tl.int64, one_stride_Bn: tl.int64, one_stride_Br: tl.int64,
    one_bias_A: tl.int64, one_bias_B: tl.int64, one_rank: tl.int32, one_activation: tl.int32, one_scaling: tl.float32,
    slice_count: tl.int32, adapters: tl.int32, M: tl.int32, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_pre: tl.int32, z_pages: tl.int32, shrink_tiles: tl.int32, expand_tiles: tl.int32, shrink_splits: tl.int32,
    expand_splits: tl.int32, dense: tl.int32, threshold: tl.int32, keep_scale: tl.float32,
    DTYPE: tl.constexpr, MANY: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, ONCE: tl.constexpr,
    DOWN: tl.constexpr, IEEE: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr, SPLIT: tl.constexpr,
    W_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BY_ROW: tl.constexpr, SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, SHRINK_R: tl.constexpr,
    SHRINK_STEP: tl.constexpr, STAY: tl.constexpr,
):  # fmt: skip
    """Shrink tiles 0 … shrink_tiles - 1, then expand tiles; z is written by the ones and read by the others.

    Forward: z is z. Backward: x is dY, y is dX, z is u, and pre holds the forward's z.
    """
    row_blocks = tl.cdiv(M, BLOCK_M)
    rank_blocks = tl.cdiv(z_pages * PAGE, SHRINK_R)
    shrink_arrivals = counters + READY + row_blocks
    expand_arrivals = shrink_arrivals + shrink_tiles
    tile = draw(counters) if ONCE else tl.program_id(0)
    while tile < shrink_tiles + expand_tiles:
        if tile < shrink_tiles:
            complete = shrink_tile(
                tile, x, z, pre, shrink_partials, shrink_arrivals, order, ids, starts, owners, blocks, seed,
                pages, rows, biases, slices, adapters,
                one_B if BACKWARD else one_A, one_stride_Br if BACKWARD else one_stride_A, one_stride_Bn,
                one_bias_A, one_rank, one_activation,
                M, K, stride_xm, stride_xk, stride_pre, z_pages, shrink_splits, dense, threshold, keep_scale,
                DTYPE, MANY, PACKED, BACKWARD, DOWN, DROPOUT and not BACKWARD, QUADS, SHRINK_M, SHRINK_K, SHRINK_R,
                SHRINK_STEP,
            )  # fmt: skip
            if ONCE:
                if complete:
                    publish(counters, tile // shrink_splits // rank_blocks * SHRINK_M // BLOCK_M)
        else:
            expand_tile(
                tile - shrink_tiles, x, x_tiles, weight, bias, y, z, expand_partials, expand_arrivals, counters,
                order, ids, starts, owners, blocks, seed, pages, rows, scaling, biases, slices, slice_count, adapters,
                one_A if BACKWARD else one_B, 1 if BACKWARD else one_stride_Bn,
                one_stride_A if BACKWARD else one_stride_Br, one_bias_B, one_rank, one_activation, one_scaling,
                M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, z_pages, expand_splits, rank_blocks, SHRINK_M,
                threshold, keep_scale,
                DTYPE, MANY, PACKED, BACKWARD, ONCE, IEEE, W_TILES, SPLIT, DROPOUT, QUADS,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, BY_ROW,
            )  # fmt: skip
        tile = draw(counters) if STAY else shrink_tiles + expand_tiles
    if ONCE:
        leave(counters, row_blocks)


class Many(NamedTuple):
    """The tensors of a `peftk.adapters.table.AdapterTable`, or of several side by side
    (`peftk.adapters.table.pack`)."""

    pages: Tensor
    rows: Tensor
    scaling: Tensor
    biases: Tensor
    slices: Tensor | None  # int32 [slice_count + 1, 2]: first column, first page of z; None: one slice
    adapters: int  # of each slice
    slice_count: int = 1
    aligned_slices: int = 0  # 16: every slice begins at a multiple of 16 columns; 1: some don't; 0: one slice


class Adapters(NamedTuple):
    """What the launcher needs to know about the adapters of a call."""

    source: AdapterArgs | Many
    dtype: torch.dtype
    z_width: int  # the largest rank in whole pages, summed over the slices; 0: no shrink tiles
    A: str  # how A's pages lie, as `shrink` calls it: "k16", "k", "any"
    B: str  # the same of B, "k" being N: "r16" too

    def sources(self) -> tuple[AdapterArgs, Many | None]:
        """What a kernel takes of one adapter, and of many."""
        return (NO_ADAPTER, self.source) if isinstance(self.source, Many) else (self.source, None)


BASE_ONLY = Adapters(NO_ADAPTER, torch.float32, 0, "k", "any")

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapters: Adapters,
    segments: Segments | None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    save_z: bool = False,
    plan: config.Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] in x's dtype and, if asked, z [M, z_width] in fp32 (zero where the row's adapter has no such rank).

    x [M, K] and weight [N, K] have any strides, bias [N] is contiguous; weight None is the identity. segments: None
    with one adapter. plan: one to be tried. Nothing is copied between host and device and nothing waits, so a CUDA
    graph can capture the call.
    """
    M, K = x.shape
    N = K if weight is None else weight.shape[0]
    z = torch.empty(M, adapters.z_width, dtype=torch.float32, device=x.device)
    y = _launch(x, weight, bias, N, z, None, adapters, segments, dropout_p, seed, dense=save_z, plan=plan)
    return y, z if save_z else None


def backward(
    dy: Tensor,
    weight: Tensor | None,
    columns: int,
    adapters: Adapters,
    segments: Segments | None,
    z: Tensor | None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = True,
    plan: config.Plan | None = None,
) -> tuple[Tensor | None, Tensor]:
    """dX [M, columns] in dy's dtype, if needed, and u [M, z_width] in fp32, from dY [M, N] and the forward's z."""
    u = torch.empty(dy.shape[0], adapters.z_width, dtype=torch.float32, device=dy.device)
    z = u if z is None else z  # where it wasn't saved, none is read
    swapped = None if weight is None else weight.t()
    dx = _launch(
        dy,
        swapped,
        None,
        columns if need_dx else 0,
        u,
        z,
        adapters,
        segments,
        dropout_p,
        seed,
        dense=True,
        backward=True,
        plan=plan,
    )
    return dx if need_dx else None, u


def _launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    N: int,
    z: Tensor,
    pre: Tensor | None,
    adapters: Adapters,
    segments: Segments | None,
    dropout_p: float,
    seed: Tensor | None,
    *,
    dense: bool,
    backward: bool = False,
    plan: config.Plan | None = None,
) -> Tensor:
    """y [M, N], and z filled. N = 0: only z."""
    (M, K), device = x.shape, x.device
    y = torch.empty(M, N, dtype=x.dtype, device=device)
    if not M or not (N or adapters.z_width):
        return y
    one, many = adapters.sources()
    weight_dtype = x.dtype if weight is None else weight.dtype
    form = config.Form(
        M=M,
        N=N,
        K=K,
        many=many is not None,
        packed=many is not None and many.slice_count > 1,
        backward=backward,
        wide=K % 16 == 0 and _wide(x) and (weight is None or _wide(weight)),
        x=x.dtype,
        weight=weight_dtype,
        adapters=adapters.dtype,
        own_sums=backward and dropout_p > 0.0,
        z_pages=adapters.z_width // PAGE.value,
        identity=weight is None,
    )
    where = target(device)
    plan = config.fitted(plan, form) if plan else tuned.lora_linear(form, device, where)
    row_blocks = triton.cdiv(M, plan.BLOCK_M)
    shrink_tiles = triton.cdiv(M, plan.SHRINK_M) * triton.cdiv(adapters.z_width, plan.SHRINK_R) * plan.shrink_splits
    expand_tiles = row_blocks * triton.cdiv(N, plan.BLOCK_N) * plan.expand_splits
    count = READY.value + row_blocks + shrink_tiles + expand_tiles
    shrink_part = plan.SHRINK_M * plan.SHRINK_R if plan.shrink_splits > 1 else 0
    expand_part = plan.BLOCK_M * plan.BLOCK_N if plan.expand_splits > 1 else 0
    partials = torch.empty(shrink_tiles * shrink_part + expand_tiles * expand_part, dtype=torch.float32, device=device)
    x_tiles, w_tiles, w_kind = _tiles(x, weight, plan, many is not None)

    tiles = shrink_tiles + expand_tiles
    grid = min(tiles, plan.per_processor * workspace.processors(device)) if plan.per_processor else tiles
    launches = [(grid, shrink_tiles, expand_tiles)]
    if not plan.once:
        launches = [(shrink_tiles, shrink_tiles, 0), (expand_tiles, 0, expand_tiles)]
    with workspace.on(device), workspace.counters(device, count) as counters:
        for blocks, shrinks, expands in launches:
            if not blocks:
                continue
            lora_linear_kernel[(blocks,)](
                x, x_tiles, w_tiles, bias, y, z, pre, partials, partials[shrink_tiles * shrink_part :], counters,
                seed if dropout_p else None, *_rows(segments), *(many[:5] if many else (None,) * 5),
                *one, many.slice_count if many else 1, many.adapters if many else 1,
                M, N, K, *x.stride(), *((0, 0) if weight is None else weight.stride()),
                0 if pre is None else pre.stride(0), z.shape[1] // PAGE.value,
                shrinks, expands, plan.shrink_splits, plan.expand_splits, int(dense),
                *philox.arguments(dropout_p),
                DTYPE=DTYPES[adapters.dtype], MANY=many is not None, PACKED=many.aligned_slices if many else 0,
                BACKWARD=backward, ONCE=plan.once, STAY=plan.once and plan.per_processor > 0,
                DOWN=adapters.B if backward else adapters.A, IEEE=x.dtype == weight_dtype == torch.float32,
                DROPOUT=dropout_p > 0.0, QUADS=(N if backward else K) % 4 == 0, SPLIT=plan.expand_splits > 1,
                W_TILES=w_kind, **plan.compiled(), **config.options(where),
            )  # fmt: skip
    return y


def _rows(segments: Segments | None) -> tuple[Tensor | None, ...]:
    """What the kernel reads of the segments."""
    if segments is None:
        return (None,) * 5
    return segments.order, segments.ids, segments.starts, segments.owners, segments.blocks


def _tiles(
    x: Tensor, weight: Tensor | None, plan: config.Plan, many: bool
) -> tuple[TensorDescriptor | None, Tensor | TensorDescriptor | None, str]:
    """Descriptors of x (where its rows stand in their order) and W, for the copy engine of sm_90 and later."""
    if not plan.descriptors or weight is None:
        return None, weight, ""
    x_tiles = None if many or x.stride(1) != 1 else TensorDescriptor.from_tensor(x, [plan.BLOCK_M, plan.BLOCK_K])
    if weight.stride(1) == 1:
        return x_tiles, TensorDescriptor.from_tensor(weight, [plan.BLOCK_N, plan.BLOCK_K]), "nk"
    return x_tiles, TensorDescriptor.from_tensor(weight.t(), [plan.BLOCK_K, plan.BLOCK_N]), "kn"


def _wide(t: Tensor) -> bool:
    """Whether the compiler can see that t's rows (or columns) are contiguous and start on 16 bytes."""
    along, across = sorted(t.stride())
    return along == 1 and across % 16 == 0 and t.data_ptr() % 16 == 0
