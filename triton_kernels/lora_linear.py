"""A linear layer with its adapters in one launch: forward and dX. `docs/lora_linear.md` has the derivation.

    shrink   z[m] = x̃[m] A_iᵀ + a_i                                      → fp32 [M, z_width]
    expand   y[m] = x[m] Wᵀ + bias + s_i · act(z[m]) B_iᵀ + β_i          the base GEMM; the adapter is its epilogue

The blocks of a launch draw tickets (`tickets`): the first tickets are shrink tiles, the later ones expand tiles. An
expand tile computes its base product first and only then waits for the z of its rows, which is usually complete by
then. The same code also runs as two launches (PART): shrink tiles, then expand tiles, numbered by block, without
tickets. Each is compiled without the other's code, so the shrink needs few registers and little shared memory, and
several of its blocks share a multiprocessor. On sm_90 and later the second launch may begin while the first one runs
(OVERLAP, programmatic dependent launch): its blocks compute their base product, and wait for the whole first launch
before they read z.

In the backward the roles are swapped: the shrink computes u[m] = (dY[m] B_i) ⊙ act'(z[m]), the expand
dX[m] = dY[m] W + mask/(1-p) ⊙ s_i · u[m] A_i.

Rows are processed in the order of their adapters (`segments`), so a block of rows has few adapters. It either goes
through its adapters one by one, with dots over all its rows ("by segment"); or, where most of those dots would be
thrown away, computes every row's products separately and without dots ("by row"). Both read the adapters as
`peftk.adapters.table` describes them: many (MANY) from device memory, one from the kernel's arguments, so that a call
with one adapter copies nothing to the device. Packed outputs (PACKED) are slices of W's rows, each with its own
adapters, for example query, key and value. Ranks come in pages of 16; no rank is a compile-time constant. Rows and
ranks are selected, not multiplied by zero, so an adapter's inf stays in its own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from peftk.launch import workspace
from peftk.launch.adapter_args import NO_ADAPTER, AdapterArgs
from peftk.launch.segments import Segments
from peftk.system import precision, streams

from . import config, philox, tuned
from .expand import expand_tile
from .segments import PAGE
from .shrink import shrink_tile
from .tickets import READY, draw_ticket, leave, let_next_launch_begin, publish
from .tuned import target

# Arguments that change between calls. Specialized, each would be compiled again for 1 and for multiples of 16.
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
    DTYPE: tl.constexpr, MANY: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, PART: tl.constexpr,
    OVERLAP: tl.constexpr, STAY: tl.constexpr, DOWN: tl.constexpr, IEEE: tl.constexpr, FIELD: tl.constexpr,
    DROPOUT: tl.constexpr, QUADS: tl.constexpr, SPLIT: tl.constexpr, W_TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, BY_ROW: tl.constexpr, SHRINK_M: tl.constexpr,
    SHRINK_K: tl.constexpr, SHRINK_R: tl.constexpr, SHRINK_STEP: tl.constexpr,
):  # fmt: skip
    """Runs shrink tiles 0 … shrink_tiles - 1, which write z, then expand tiles, which read it.

    PART: "both", by tickets; or "shrink" or "expand" alone. In the backward x is dY, y is dX, z is u, and pre is the
    forward's z. FIELD: see `peftk.precision`.
    """
    ONCE: tl.constexpr = PART == "both"
    if OVERLAP and PART == "shrink":
        let_next_launch_begin()
    row_blocks = tl.cdiv(M, BLOCK_M)
    rank_blocks = tl.cdiv(z_pages * PAGE, SHRINK_R)
    shrink_arrivals = counters + READY + row_blocks
    expand_arrivals = shrink_arrivals + shrink_tiles
    tile = draw_ticket(counters) if ONCE else tl.program_id(0)
    if PART == "expand":
        tile += shrink_tiles
    while tile < shrink_tiles + expand_tiles:
        if tile < shrink_tiles if ONCE else PART == "shrink":  # known when a part is compiled
            complete = shrink_tile(
                tile, x, z, pre, shrink_partials, shrink_arrivals, order, ids, starts, owners, blocks, seed,
                pages, rows, biases, slices, adapters,
                one_B if BACKWARD else one_A, one_stride_Br if BACKWARD else one_stride_A, one_stride_Bn,
                one_bias_A, one_rank, one_activation,
                M, K, stride_xm, stride_xk, stride_pre, z_pages, shrink_splits, dense, threshold, keep_scale,
                DTYPE, MANY, PACKED, BACKWARD, DOWN, DROPOUT and not BACKWARD, QUADS, FIELD,
                SHRINK_M, SHRINK_K, SHRINK_R, SHRINK_STEP,
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
                DTYPE, MANY, PACKED, BACKWARD, ONCE, IEEE, FIELD, W_TILES, SPLIT, DROPOUT, QUADS,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, BY_ROW, OVERLAP,
            )  # fmt: skip
        tile = draw_ticket(counters) if STAY else shrink_tiles + expand_tiles
    if ONCE:
        leave(counters, row_blocks)


class ManyAdapters(NamedTuple):
    """The tensors of one `peftk.adapters.table.AdapterTable`, or of several packed by `peftk.adapters.table.pack`."""

    pages: Tensor
    rows: Tensor
    scaling: Tensor
    biases: Tensor
    slices: Tensor | None  # int32 [slice_count + 1, 2]: first column, first page of z; None: a single slice
    adapters: int  # in each slice
    slice_count: int = 1
    aligned_slices: int = 0  # 16: every slice begins at a multiple of 16 columns; 1: not all do; 0: a single slice


class Adapters(NamedTuple):
    """What the launcher needs to know about the adapters of a call."""

    source: AdapterArgs | ManyAdapters
    dtype: torch.dtype
    z_width: int  # the largest rank in whole pages, summed over the slices; 0: no shrink tiles
    A: str  # memory layout of A's pages, see `shrink._down_pointer`: "k16", "k" or "any"
    B: str  # the same for B, whose "k" is N; also "r16"

    def sources(self) -> tuple[AdapterArgs, ManyAdapters | None]:
        """The kernel's arguments for one adapter, and for many (None if there is one)."""
        return (NO_ADAPTER, self.source) if isinstance(self.source, ManyAdapters) else (self.source, None)


BASE_ONLY = Adapters(NO_ADAPTER, torch.float32, 0, "k", "any")

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def field_dtype(x: torch.dtype) -> tl.dtype | None:
    """FIELD of a call: x's dtype if factors are to be rounded to it (`peftk.precision`), else None."""
    return DTYPES[x] if precision.field() and x != torch.float32 else None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapters: Adapters,
    segments: Segments | None,
    *,
    base: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    save_z: bool = False,
    plan: config.Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] in x's dtype and, with save_z, z [M, z_width] in fp32 (0 where the row's adapter has no such rank).

    x [M, K] and weight [N, K] have any strides, bias [N] is contiguous; weight None is the identity. segments is None
    with one adapter. base: y [M, N], contiguous, if xWᵀ + bias is already computed; the adapters are added to it in
    place, and weight and bias are None. plan: replaces the chosen plan. Nothing is copied between host and device and
    the host does not wait, so a CUDA graph can capture the call.
    """
    M, K = x.shape
    N = base.shape[1] if base is not None else K if weight is None else weight.shape[0]
    z = torch.empty(M, adapters.z_width, dtype=torch.float32, device=x.device)
    y = _launch(x, weight, bias, N, z, None, adapters, segments, dropout_p, seed, base=base, dense=save_z, plan=plan)
    return y, z if save_z else None


def backward(
    dy: Tensor,
    weight: Tensor | None,
    columns: int,
    adapters: Adapters,
    segments: Segments | None,
    z: Tensor | None,
    *,
    base: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = True,
    plan: config.Plan | None = None,
) -> tuple[Tensor | None, Tensor]:
    """dX [M, columns] in dy's dtype (None without need_dx) and u [M, z_width] in fp32, from dY [M, N] and forward's z.

    z may be None if no adapter has an activation. base [M, columns]: dY W, which becomes dX. Everything else is as in
    `forward`.
    """
    u = torch.empty(dy.shape[0], adapters.z_width, dtype=torch.float32, device=dy.device)
    z = u if z is None else z  # None: the kernel does not read it
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
        base=base,
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
    base: Tensor | None,
    dense: bool,
    backward: bool = False,
    plan: config.Plan | None = None,
) -> Tensor:
    """Returns y [M, N] and fills z. N = 0: only z."""
    (M, K), device = x.shape, x.device
    y = x.new_empty((M, N)) if base is None else base
    if not M or not (N or adapters.z_width):
        return y
    one, many = adapters.sources()
    read = (x, weight, bias, y, z, pre, seed if dropout_p else None, *_segment_tensors(segments))
    read += many[:5] if many else (None,) * 5
    form: tuple[Any, ...] = (
        M, N, K, x.dtype, x.stride(), *((None, None) if weight is None else (weight.dtype, weight.stride())),
        None if bias is None else bias.dtype, adapters[1:], many and many[5:], backward, dropout_p > 0.0,
        base is not None, field_dtype(x.dtype), plan, device, target(device), workspace.processors(device),
        tuple([None if tensor is None else tensor.data_ptr() % 16 == 0 for tensor in read]),
    )  # fmt: skip
    record = tuned.record(form, _new_record)
    if record.plan.overlap and streams.capturing(device):  # a driver before CUDA 12.3 has no such edges in a graph
        apart = _Form(*form)._replace(plan=record.plan._replace(overlap=False))
        record = tuned.record(apart, _new_record)
    # z stands for sums that nothing writes
    partials = torch.empty(record.partials, dtype=torch.float32, device=device) if record.partials else z
    expand_partials = partials[record.expand_partials :] if record.expand_partials else partials
    product = _product(x, weight, base, record.plan, many is not None)
    with streams.on(device), workspace.counters(device, record.counters) as counters:
        for launch in record.launches:
            launch.run(
                device, x, product.x_tiles, product.weight, *read[2:6],
                partials, expand_partials, counters, *read[6:],
                *one, many.slice_count if many else 1, many.adapters if many else 1,
                M, N, K, *x.stride(), *product.strides,
                0 if pre is None else pre.stride(0), adapters.z_width // PAGE.value,
                record.shrink_tiles, record.expand_tiles, record.plan.shrink_splits, record.plan.expand_splits,
                int(dense), *philox.arguments(dropout_p),
            )  # fmt: skip
    return y


class _Form(NamedTuple):
    """Everything of a call that its plan and its compiled kernels depend on. Calls of one form share a record."""

    M: int
    N: int
    K: int
    x: torch.dtype
    x_strides: tuple[int, ...]
    weight: torch.dtype | None
    weight_strides: tuple[int, ...] | None
    bias: torch.dtype | None
    adapters: tuple[torch.dtype, int, str, str]  # the fields of `Adapters` after `source`
    many: tuple[int, int, int] | None  # those of `ManyAdapters` after its tensors
    backward: bool
    dropout: bool
    over_base: bool
    field: tl.dtype | None
    plan: config.Plan | None  # one that replaces the chosen one
    device: torch.device
    target: int | str
    processors: int
    aligned: tuple[bool | None, ...]  # whether the tensors start at multiples of 16 bytes, from x on; None: no tensor


class _Record(NamedTuple):
    """What calls of one form share: the plan, the memory and the launches."""

    plan: config.Plan
    shrink_tiles: int
    expand_tiles: int
    counters: int
    partials: int
    expand_partials: int  # where those of the expand tiles begin
    launches: tuple[Launch, ...]


def _new_record(fields: tuple[Any, ...]) -> _Record:
    """fields: of `_Form`, which takes longer to make than a tuple."""
    form = _Form(*fields)
    adapter_dtype, z_width, layout_A, layout_B = form.adapters
    slice_count, aligned_slices = (1, 0) if form.many is None else form.many[1:]
    weight = form.weight or form.x
    wide = form.K % 16 == 0 and _wide(form.x_strides, form.aligned[0])
    call = config.CallShape(
        M=form.M,
        N=form.N,
        K=form.K,
        many=form.many is not None,
        packed=slice_count > 1,
        backward=form.backward,
        wide=wide and (form.weight_strides is None or _wide(form.weight_strides, form.aligned[1])),
        x=form.x,
        weight=weight,
        adapters=adapter_dtype,
        own_sums=form.backward and form.dropout,
        z_pages=z_width // PAGE.value,
        identity=form.weight is None,
    )
    if form.plan is None:
        plan = tuned.lora_linear(call, form.device, form.target)
    else:
        plan = config.with_splits(form.plan, call, form.target)
    row_blocks = triton.cdiv(form.M, plan.BLOCK_M)
    shrink_tiles = triton.cdiv(form.M, plan.SHRINK_M) * triton.cdiv(z_width, plan.SHRINK_R) * plan.shrink_splits
    expand_tiles = row_blocks * triton.cdiv(form.N, plan.BLOCK_N) * plan.expand_splits
    expand_partials = shrink_tiles * (plan.SHRINK_M * plan.SHRINK_R if plan.shrink_splits > 1 else 0)
    expand_part = plan.BLOCK_M * plan.BLOCK_N if plan.expand_splits > 1 else 0
    # counters of arrivals, by tile: those of the shrink first
    arrivals = shrink_tiles if plan.shrink_splits > 1 or plan.expand_splits > 1 else 0
    arrivals += expand_tiles // plan.expand_splits if plan.expand_splits > 1 else 0
    tiles = shrink_tiles + expand_tiles
    grid = min(tiles, plan.per_processor * form.processors) if plan.per_processor else tiles
    launches = [("both", grid)]
    if not plan.once:
        launches = [("shrink", shrink_tiles), ("expand", expand_tiles)]
        launches = [launch for launch in launches if launch[1]]
    overlap = plan.overlap and len(launches) == 2
    constants = {
        "DTYPE": DTYPES[adapter_dtype], "MANY": call.many, "PACKED": aligned_slices, "BACKWARD": form.backward,
        "OVERLAP": overlap, "STAY": plan.once and plan.per_processor > 0,
        "DOWN": layout_B if form.backward else layout_A, "IEEE": form.x == weight == torch.float32,
        "FIELD": form.field, "DROPOUT": form.dropout, "QUADS": (form.N if form.backward else form.K) % 4 == 0,
        "SPLIT": plan.expand_splits > 1, "W_TILES": _tiles_of_weight(form.weight_strides, plan),
    }  # fmt: skip
    return _Record(
        plan,
        shrink_tiles,
        expand_tiles,
        READY.value + row_blocks + arrivals,
        expand_partials + expand_tiles * expand_part,
        expand_partials,
        tuple(
            Launch(
                lambda: lora_linear_kernel,
                blocks,
                {**constants, "PART": part, **plan.compiled(part)},
                config.launch_options(form.target, part, overlap),
            )
            for part, blocks in launches
        ),
    )


class Launch:
    """One launch of a record. kernel: gives the jitted function.

    Triton's launcher finds the compiled kernel by the types, values and alignments of all arguments, in every launch.
    They are those of the form, so its answer is kept, and launched as `triton.compile`'s result is.
    """

    def __init__(
        self, kernel: Callable[[], Any], blocks: int, constants: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self._kernel, self.blocks = kernel, blocks
        self._constants, self._options = constants, options
        self._compiled: CompiledKernel | None = None
        self._in_order: tuple[Any, ...] = ()  # the constants as positional arguments

    def run(self, device: torch.device, *arguments: Any) -> None:
        if self._compiled is not None:
            self._compiled[(self.blocks, 1, 1)](*arguments, *self._in_order, stream=streams.handle(device))
            return
        kernel = self._kernel()
        found = kernel[(self.blocks,)](*arguments, **self._constants, **self._options)
        if isinstance(found, CompiledKernel):
            names = kernel.arg_names[len(arguments) :]
            self._in_order, self._compiled = tuple(self._constants[name] for name in names), found


def _segment_tensors(segments: Segments | None) -> tuple[Tensor | None, ...]:
    """The tensors of the segments that the kernel reads."""
    if segments is None:
        return (None,) * 5
    return segments.order, segments.ids, segments.starts, segments.owners, segments.blocks


class _Product(NamedTuple):
    """Where a tile of y starts from, as `expand.expand_tile` takes it."""

    x_tiles: TensorDescriptor | None
    weight: Tensor | TensorDescriptor
    strides: tuple[int, ...]


def _product(x: Tensor, weight: Tensor | None, base: Tensor | None, plan: config.Plan, many: bool) -> _Product:
    """xWᵀ, with tensor descriptors for the TMA of sm_90 and later; or base, or x itself where W is the identity.

    x has a descriptor if its rows are in their original order.
    """
    if weight is None:
        base = x if base is None else base
        return _Product(None, base, base.stride())
    if not plan.descriptors:
        return _Product(None, weight, weight.stride())
    x_tiles = None if many or x.stride(1) != 1 else TensorDescriptor.from_tensor(x, [plan.BLOCK_M, plan.BLOCK_K])
    if _tiles_of_weight(weight.stride(), plan) == "nk":
        w_tiles = TensorDescriptor.from_tensor(weight, [plan.BLOCK_N, plan.BLOCK_K])
    else:
        w_tiles = TensorDescriptor.from_tensor(weight.t(), [plan.BLOCK_K, plan.BLOCK_N])
    return _Product(x_tiles, w_tiles, weight.stride())


def _tiles_of_weight(strides: tuple[int, ...] | None, plan: config.Plan) -> str:
    """W_TILES of the kernel: "base" without a weight, else the order of a descriptor's sides, "" for no descriptor."""
    if strides is None:
        return "base"
    return ("nk" if strides[1] == 1 else "kn") if plan.descriptors else ""


def _wide(strides: tuple[int, ...], aligned: bool | None) -> bool:
    """Whether the compiler can see that a tensor's rows (or columns) are contiguous and aligned to 16 bytes."""
    along, across = sorted(strides)
    return along == 1 and across % 16 == 0 and bool(aligned)
