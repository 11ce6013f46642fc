"""All gradients of all adapters of one linear layer in one launch. `docs/lora_wgrad.md` has the derivation.

    dA_i = s_i · u_iᵀ x̃_i     dB_i = s_i · dY_iᵀ v_i     da_i = s_i · Σ u_i     dβ_i = Σ dY_i        v = act(z)

over the rows of adapter i. A program computes one tile: some ranks of one adapter by some columns of x (dA) or of dY
(dB), summed over a range of at most `range_rows` of the adapter's rows. The first range of every adapter has its own
program. The further ranges are found through the boundaries, the multiples of range_rows in the sorted order: each
boundary is in one segment, and any range_rows consecutive rows contain one boundary. Where an adapter has several
ranges, the program that arrives last adds their fp32 sums in ascending order. There are no floating-point atomics, and
the bits do not depend on the schedule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftk.adapters.adapter import AdapterGrads, Wanted
from peftk.launch import workspace
from peftk.launch.segments import Segments
from peftk.system import streams

from . import config, philox, tuned
from .arithmetic import activate, dot, round_to
from .lora_linear import Adapters, Launch, field_dtype
from .philox import keep_mask
from .segments import PAGE, rows_at
from .tuned import WgradShape, target

# Arguments that change between calls. Specialized, each would be compiled again for 1 and for multiples of 16.
_VARYING = ["rank", "activation", "scaling", "place_A", "place_B", "place_a", "place_b"]
_VARYING += ["M", "z_pages", "heads", "pieces", "blocks_A", "blocks", "range_rows", "threshold", "keep_scale"]


@triton.jit(do_not_specialize=_VARYING)
def wgrad_kernel(
    dy, x, z, u, order, ids, ends, rows, scalings, slices, tasks, firsts, seed, dA, dB, da, db, partials, counters,
    rank: tl.int32, activation: tl.int32, scaling: tl.float32,
    place_A: tl.int32, place_B: tl.int32, place_a: tl.int32, place_b: tl.int32,
    M: tl.int32, N, K, stride_ym, stride_yn, stride_xm, stride_xk, stride_zm, z_pages: tl.int32,
    heads: tl.int32, pieces: tl.int32, blocks_A: tl.int32, blocks: tl.int32, range_rows: tl.int32,
    threshold: tl.int32, keep_scale: tl.float32,
    MANY: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr, FIELD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Computes one tile of dAᵢ or of dBᵢᵀ, [PAGES · 16 ranks, BLOCK_C columns], and its piece of daᵢ or dβᵢ."""
    RANKS: tl.constexpr = PAGES * PAGE
    column = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    # from program `heads` on: the further range that the place boundary · range_rows stands for
    boundary = (head - heads) // pieces + 1
    piece = (head - heads) % pieces  # which piece of the ranks of an id's adapters
    start, end = 0, M
    if MANY:
        task = head
        if head >= heads:
            i = tl.load(ids + boundary * range_rows)
            first_task = tl.load(firsts + i * 2, mask=i >= 0, other=0)
            task = tl.where(piece < tl.load(firsts + i * 2 + 1, mask=i >= 0, other=0), first_task + piece, -1)
        if task < 0:
            return
        task *= 9  # an index, not a pointer: AMD's compiler cannot follow a pointer through branches
        i = tl.load(tasks + task)
        entry = tl.load(tasks + task + 1)
        piece = tl.load(tasks + task + 2)
        group = tl.load(tasks + task + 3)
        place_A = tl.load(tasks + task + 4)
        place_B = tl.load(tasks + task + 5)
        place_a = tl.load(tasks + task + 6)
        place_b = tl.load(tasks + task + 7)
        rank = tl.load(rows + entry * 4 + 1)
        activation = tl.load(rows + entry * 4 + 2)
        scaling = tl.load(scalings + entry)
        start = tl.load(ends + i)
        end = tl.load(ends + i + 1)
        if PACKED > 0:
            at_slice = slices + tl.load(tasks + task + 8) * 2
            from_n = tl.multiple_of(tl.load(at_slice), PACKED)
            z += tl.load(at_slice + 1) * PAGE
            u += tl.load(at_slice + 1) * PAGE
            dy += from_n.to(tl.int64) * stride_yn
            N = tl.load(at_slice + 2) - from_n
            if (column - blocks_A) * BLOCK_C >= N:
                return
    else:
        if head < heads:
            piece = head
        group = piece
    number = 0
    if head >= heads:
        number = tl.cdiv(boundary * range_rows - start, range_rows)
    first = start + number * range_rows
    if (head >= heads) & ((number == 0) | (first >= end)):
        return
    last = tl.minimum(first + range_rows, end)
    r = group * RANKS + tl.arange(0, RANKS)

    if column < blocks_A:
        c_start = column * BLOCK_C
        width = K
        acc = _product_tile(
            u, x, order, first, tl.where(place_A >= 0, last, first), M, r, rank, 0, z_pages * PAGE, c_start, K,
            stride_xm, stride_xk, seed, threshold, MANY, DROPOUT, QUADS, FIELD, RANKS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        if DROPOUT:
            acc *= keep_scale
        summed = tl.where((place_a >= 0) & (column == 0), last, first)
        sums = _column_sums(u, order, first, summed, M, group * RANKS, rank, z_pages * PAGE, 1, MANY, BLOCK_R, BLOCK_C)
    else:
        c_start = (column - blocks_A) * BLOCK_C
        width = N
        acc = _product_tile(
            z, dy, order, first, tl.where(place_B >= 0, last, first), M, r, rank, activation, stride_zm, c_start, N,
            stride_ym, stride_yn, seed, threshold, MANY, False, QUADS, FIELD, RANKS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        summed = tl.where((place_b >= 0) & (group == 0), last, first)
        sums = _column_sums(dy, order, first, summed, M, c_start, N, stride_ym, stride_yn, MANY, BLOCK_R, BLOCK_C)

    ranges = tl.cdiv(end - start, range_rows)
    complete = True
    if ranges > 1:
        lane = tl.arange(0, BLOCK_C)
        inside = tl.arange(0, RANKS)[:, None] * BLOCK_C + lane[None, :]
        SIZE: tl.constexpr = (RANKS + 1) * BLOCK_C
        # two slots per boundary: a first range and a further one may begin between the same two boundaries
        step = pieces.to(tl.int64) * blocks * SIZE
        tile = partials + (start // range_rows * 2) * step + (piece * blocks + column) * SIZE
        mine = tile + tl.where(number > 0, 2 * number + 1, 0) * step
        tl.store(mine + inside, acc)
        tl.store(mine + RANKS * BLOCK_C + lane, sums)
        counter = counters + (start // range_rows * pieces + piece) * blocks + column
        tl.debug_barrier()  # all threads have stored their part of the sums before one of them counts the arrival
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        complete = arrived == ranges - 1
        if complete:
            tl.store(counter, 0)
            acc = tl.load(tile + inside)
            sums = tl.load(tile + RANKS * BLOCK_C + lane)
            for other in tl.range(1, ranges, num_stages=1):
                theirs = tile + (2 * other + 1) * step
                acc += tl.load(theirs + inside)
                sums += tl.load(theirs + RANKS * BLOCK_C + lane)
    if complete:
        c = c_start + tl.arange(0, BLOCK_C)
        mask = (r < rank)[:, None] & (c < width)[None, :]
        if column < blocks_A:
            if place_A >= 0:
                out = dA + (place_A.to(tl.int64) * PAGE + r)[:, None] * K + c[None, :]
                tl.store(out, round_to(acc * scaling, dA.dtype.element_ty), mask=mask)
            if (place_a >= 0) & (column == 0):
                lane = tl.arange(0, BLOCK_C)
                out = da + place_a * PAGE + group * RANKS + lane
                owned = (lane < RANKS) & (group * RANKS + lane < rank)
                tl.store(out, round_to(sums * scaling, da.dtype.element_ty), mask=owned)
        else:
            if place_B >= 0:
                out = dB + place_B.to(tl.int64) * PAGE + c[:, None].to(tl.int64) * rank + r[None, :]
                tl.store(out, tl.trans(round_to(acc * scaling, dB.dtype.element_ty)), mask=tl.trans(mask))
            if (place_b >= 0) & (group == 0):
                tl.store(db + place_b.to(tl.int64) + c, round_to(sums, db.dtype.element_ty), mask=c < N)


@triton.jit
def _product_tile(
    left, right, order, first, last, M, r, rank, code, stride_left, c_start, width, stride_m, stride_c,
    seed, threshold, MANY: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr, FIELD: tl.constexpr,
    RANKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[RANKS, BLOCK_C]: act(left)ᵀ · right over the rows at places first … last - 1. left is z or u, in fp32."""
    c = c_start + tl.arange(0, BLOCK_C)
    acc = tl.zeros((RANKS, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_R):
        position = start + tl.arange(0, BLOCK_R)
        row = rows_at(position, order, M, MANY)
        own = position < last
        left_mask = own[:, None] & (r < rank)[None, :]
        left_tile = tl.load(left + (row * stride_left)[:, None] + r[None, :], mask=left_mask, other=0.0)
        mask = own[:, None] & (c < width)[None, :]
        right_row = right + row * stride_m
        tile = tl.load(right_row[:, None] + c[None, :].to(tl.int64) * stride_c, mask=mask, other=0.0)
        if DROPOUT:
            # this is x̃ · (1 - p), exact in x's dtype; the division comes after the sum
            tile = tl.where(keep_mask(seed, row, c_start, width, threshold, QUADS, BLOCK_C), tile, 0.0)
        if code > 0:
            left_tile = tl.where(left_mask, activate(left_tile, code), 0.0)
        if FIELD is not None:
            left_tile = round_to(left_tile, FIELD)
        acc = dot(tl.trans(left_tile), tile, acc)
    return acc


@triton.jit
def _column_sums(
    values, order, first, last, M, c_start, width, stride_m, stride_c,
    MANY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[BLOCK_C]: column sums over the rows at places first … last - 1; 0 where first = last."""
    c = c_start + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_R):
        position = start + tl.arange(0, BLOCK_R)
        row = values + rows_at(position, order, M, MANY) * stride_m
        mask = (position < last)[:, None] & (c < width)[None, :]
        total += tl.load(row[:, None] + c[None, :].to(tl.int64) * stride_c, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


class Places(NamedTuple):
    """Offsets of one adapter's gradients in the flat outputs; -1 for a gradient that is not wanted."""

    rank: int
    columns: int  # of dB
    lora_A: int  # in pages
    lora_B: int  # in 16 elements
    bias_A: int  # in pages
    bias_B: int  # in elements


class Plan(NamedTuple):
    """Which gradients of which adapters a call computes, and where it puts them. Independent of ids and values."""

    places: tuple[Places | None, ...]  # by entry of the table; None for an empty slot
    pages: int  # pages of ranks in one program's tile
    heads: int  # pieces of `pages` pages, of all adapters with a wanted gradient
    pieces: int  # the most pieces of one id
    columns: int  # of the widest slice
    sizes: tuple[int, int, int, int]  # of the outputs dA, dB, da and dβ, in the units of Places
    tasks: Tensor | None  # int32 [heads, 9], see `plan`; None with one adapter
    firsts: Tensor | None  # int32 [n, 2]: the first task of each id, and its number of tasks; None with one adapter


def plan(
    ranks: Sequence[int | None],
    wanted: Sequence[Wanted],
    columns: Sequence[int],
    x_dtype: torch.dtype,
    device: torch.device,
    *,
    many: bool = True,
) -> Plan:
    """Plans the gradients of a table of adapters, for any number of calls.

    ranks: by entry of the table; None for an empty slot. wanted: by entry; False for a tensor that an adapter does not
    have. columns: where the slices of y begin and the last one ends; (0, N) if nothing is packed. many: the tasks are
    copied to the device, so make the plan once for all calls with the same table. With one adapter (many=False) the
    kernel's arguments hold everything.

    A task is a piece of an adapter's ranks, and has nine numbers: its id, its entry in the table, its number among the
    id's pieces, its number among the adapter's pieces, its four Places and its slice.
    """
    wanted_ranks = [rank for rank, wants in zip(ranks, wanted, strict=True) if rank is not None and any(wants)]
    pages = config.wgrad_pages(max(wanted_ranks, default=0), x_dtype, target(device))
    widths = [end - start for start, end in itertools.pairwise(columns)]
    count = len(ranks) // len(widths)
    sizes = [0, 0, 0, 0]
    places: list[Places | None] = [None] * len(ranks)
    tasks: list[tuple[int, ...]] = []
    firsts: list[tuple[int, int]] = []
    for index in range(count):
        first = len(tasks)
        for number, width in enumerate(widths):
            entry = number * count + index
            rank, wants = ranks[entry], wanted[entry]
            if rank is None:
                continue
            rank_pages = -(-rank // PAGE.value)
            offsets = []
            for kind, (is_wanted, size) in enumerate(
                zip(wants, (rank_pages, rank_pages * width, rank_pages, width), strict=True)
            ):
                offsets.append(sizes[kind] if is_wanted else -1)
                sizes[kind] += size if is_wanted else 0
            places[entry] = Places(rank, width, *offsets)
            for group in range(max(-(-rank_pages // pages), 1) if any(wants) else 0):
                tasks.append((index, entry, len(tasks) - first, group, *offsets, number))
        firsts.append((first, len(tasks) - first))
    return Plan(
        tuple(places),
        pages,
        len(tasks),
        max((pieces for _, pieces in firsts), default=0),
        max(widths),
        (sizes[0], sizes[1], sizes[2], sizes[3]),
        torch.tensor(tasks, dtype=torch.int32, device=device).reshape(-1, 9) if many else None,
        torch.tensor(firsts, dtype=torch.int32, device=device).reshape(-1, 2) if many else None,
    )


def plan_of_one(
    rank: int, wanted: Wanted, N: int, x_dtype: torch.dtype, device: torch.device, *, target: int | str
) -> Plan:
    """`plan` for one adapter, kept. target: that of the device."""
    key = (rank, wanted, N, x_dtype, device, target)
    return tuned.record(key, _new_plan)


def _new_plan(key: tuple[int, Wanted, int, torch.dtype, torch.device, int | str]) -> Plan:
    rank, wanted, N, x_dtype, device, _ = key
    return plan([rank], [wanted], (0, N), x_dtype, device, many=False)


class _Form(NamedTuple):
    """Everything of a call that its tile and its compiled kernel depend on. Calls of one form share a record.

    The first field tells it from the forms of `lora_linear`.
    """

    of: str
    M: int
    N: int
    K: int
    x: torch.dtype
    dy_strides: tuple[int, ...]
    x_strides: tuple[int, ...]
    z_stride: int
    z_width: int
    adapters: torch.dtype
    many: tuple[int, int] | None  # as `PACKED`, and the slices
    plan: tuple[Any, ...]  # the fields of `Plan` from `pages` to `sizes`
    dropout: bool
    field: tl.dtype | None
    block: config.Wgrad | None  # one that replaces the chosen one
    device: torch.device
    target: int | str
    aligned: tuple[bool | None, ...]  # whether the tensors start at multiples of 16 bytes, from dy on; None: no tensor


class _Record(NamedTuple):
    """What calls of one form share. No launch: nothing is wanted."""

    blocks_A: int
    blocks: int
    range_rows: int
    counters: int
    partials: int
    launch: Launch | None


def _new_record(fields: tuple[Any, ...]) -> _Record:
    """fields: of `_Form`, which takes longer to make than a tuple."""
    form = _Form(*fields)
    pages, heads, pieces, columns, sizes = form.plan
    wide = _wide(form.dy_strides, form.N, form.aligned[0]) and _wide(form.x_strides, form.K, form.aligned[1])
    block = form.block
    if block is None:
        shape = WgradShape(pages, form.many is not None, wide, form.x)
        block = tuned.wgrad(shape, form.device, form.target)
    pages_A, pages_B, pages_a, rows_b = sizes
    blocks_A = triton.cdiv(form.K, block.BLOCK_C) if pages_A else min(pages_a, 1)
    blocks = blocks_A + (triton.cdiv(columns, block.BLOCK_C) if pages_B or rows_b else 0)
    range_rows = config.wgrad_range(form.M, heads, pieces, blocks, block)
    ranges = -(-form.M // range_rows)
    tile = (block.PAGES * PAGE.value + 1) * block.BLOCK_C
    constants = {
        "MANY": form.many is not None, "PACKED": form.many[0] if form.many else 0, "DROPOUT": form.dropout,
        "QUADS": form.K % 4 == 0, "FIELD": form.field, **block._asdict(),
    }  # fmt: skip
    programs = (heads + max(ranges - 1, 0) * pieces) * blocks
    launch = Launch(lambda: wgrad_kernel, programs, constants, config.options(form.target))
    return _Record(
        blocks_A,
        blocks,
        range_rows,
        ranges * pieces * blocks,
        2 * ranges * pieces * blocks * tile if ranges > 1 else 0,
        launch if heads * blocks else None,
    )


def wgrad(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    u: Tensor,
    adapters: Adapters,
    segments: Segments | None,
    plan: Plan,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    block: config.Wgrad | None = None,
) -> list[AdapterGrads | None]:
    """The gradients that `plan` lists, by entry of the table; None for an empty slot.

    The gradients of each kind are views of one allocation. dy [M, N] and x [M, K] have one dtype and any strides. z
    (any row stride) and u are fp32 [M, z_width], 0 where a row's adapter has no such rank. segments is None with one
    adapter. block: replaces the chosen tile. Nothing is copied between host and device and the host does not wait, so a
    CUDA graph can capture the call.
    """
    (M, N), K, device = dy.shape, x.shape[1], x.device
    dtype = adapters.dtype
    one, many = adapters.sources()
    read = (dy, x, z, u, *(segments[:3] if segments else (None, None, None)))
    read += (many.rows, many.scaling, many.slices) if many else (None, None, None)
    read += (plan.tasks, plan.firsts, seed if dropout_p else None)
    form = (
        "wgrad", M, N, K, x.dtype, dy.stride(), x.stride(), z.stride(0), u.shape[1], dtype,
        (many.aligned_slices, many.slice_count) if many else None, plan[1:6], dropout_p > 0.0, field_dtype(x.dtype),
        block, device, target(device),
        tuple([None if tensor is None else tensor.data_ptr() % 16 == 0 for tensor in read]),
    )  # fmt: skip
    record = tuned.record(form, _new_record)
    dA = torch.empty(plan.sizes[0] * PAGE.value * K, dtype=dtype, device=device)
    dB = torch.empty(plan.sizes[1] * PAGE.value, dtype=dtype, device=device)
    da = torch.empty(plan.sizes[2] * PAGE.value, dtype=dtype, device=device)
    db = torch.empty(plan.sizes[3], dtype=dtype, device=device)
    if record.launch is not None:
        partials = torch.empty(record.partials, dtype=torch.float32, device=device)
        place = (plan.places[0] if many is None else None) or _NO_PLACE
        with streams.on(device), workspace.counters(device, record.counters) as counters:
            record.launch.run(
                device, *read, dA, dB, da, db, partials, counters,
                one.rank, one.activation, one.scaling, *place[2:],
                M, N, K, *dy.stride(), *x.stride(), z.stride(0), u.shape[1] // PAGE.value,
                plan.heads, plan.pieces, record.blocks_A, record.blocks, record.range_rows,
                *philox.arguments(dropout_p),
            )  # fmt: skip
    return [None if place is None else _grad_views(place, dA, dB, da, db, K) for place in plan.places]


_NO_PLACE = Places(0, 0, -1, -1, -1, -1)


def _wide(strides: tuple[int, ...], columns: int, aligned: bool | None) -> bool:
    """Whether the compiler can see that a tensor's rows are contiguous and aligned to 16 bytes."""
    return strides[1] == 1 and columns % 16 == 0 and strides[0] % 16 == 0 and bool(aligned)


def _grad_views(place: Places, dA: Tensor, dB: Tensor, da: Tensor, db: Tensor, K: int) -> AdapterGrads:
    def view(flat: Tensor, at: int, unit: int, *shape: int) -> Tensor | None:
        return None if at < 0 else flat[at * unit : at * unit + math.prod(shape)].view(shape)

    page, rank, N = PAGE.value, place.rank, place.columns
    return AdapterGrads(
        view(dA, place.lora_A, page * K, rank, K),
        view(dB, place.lora_B, page, N, rank),
        view(da, place.bias_A, page, rank),
        view(db, place.bias_B, 1, N),
    )
