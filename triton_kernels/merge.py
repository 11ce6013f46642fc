"""merge and unmerge of a list of layers in one launch, in place, with the bits of `peftk.reference.merge`.

    merge     t ← fma over ascending ranks from +0,  d ← Σ fl(s·t) in order,  W' = round(fl(W + d));  code, raw weights
    unmerge   W″ = round(fl(W' - d)), then the code and the raw weights bring W back

All weights of a call are of one dtype, all adapters of one, all on one device; shapes, ranks and strides are each
layer's own, rows contiguous. The kernels are in `merge_tile`; `docs/merge.md` derives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from peftk.backends import workspace
from peftk.backends.merge_args import NotFiniteError
from peftk.receipt import MergeReceipt
from peftk.reference.merge import Factors

from . import config
from .lora_linear import DTYPES, target
from .merge_tile import FIELDS, checksum_kernel, merge_kernel, restore_kernel, unmerge_kernel

_RAW_SHARE = 256  # room is made for one raw weight in so many, several times what usual adapters need
_RESTORED_AT_ONCE = 256
_ODD = 0x9E3779B97F4A7C15 - 2**64  # the checksum's multiplier, as int64


class Layers(NamedTuple):
    """The layers of a call as the kernels find them. What the addresses point to is the caller's to keep."""

    table: Tensor  # int64 [layers, FIELDS]
    ends: Tensor  # int32 [adapters of all layers]: the rank after the adapter's last, within its layer
    scaling: Tensor  # float32 [adapters of all layers]
    tiles: int
    rows: int
    first_weight: tuple[int, ...]  # of each layer, and after the last


class Raw(NamedTuple):
    """Raw weights in any order. A key counts the weights of all layers through; -1 is none."""

    keys: Tensor
    values: Tensor


def merge_(weights: Sequence[Tensor], factors: Sequence[Factors]) -> list[MergeReceipt]:
    """Raises NotFiniteError where a W' would not be finite. Whatever is raised, all weights are as they were then."""
    codes = [w.new_empty(w.shape, dtype=torch.int8) for w in weights]
    layers = _layers(weights, codes, factors)
    merged = layers.table.new_zeros(layers.tiles, dtype=torch.int8)
    row_sums = layers.table.new_zeros(layers.rows, dtype=torch.int32)
    status = layers.table.new_zeros(1 + len(weights), dtype=torch.int32)  # how many raw weights; which layer is refused
    room = min(layers.first_weight[-1] // _RAW_SHARE + 1024, layers.first_weight[-1])
    raw = [_empty_raw(weights[0], room)]
    try:
        _merge(layers, weights[0], factors[0], merged, row_sums, status, raw[0])
        count, *refused = status.tolist()
        if not any(refused) and count > room:
            # the tiles that found no room stayed as they were: once more for these, now with room for all
            raw = [raw[0], _empty_raw(weights[0], count)]
            status[0] = 0
            _merge(layers, weights[0], factors[0], merged, row_sums, status, raw[1])
            count, *refused = status.tolist()
        if any(refused):
            raise NotFiniteError(refused.index(1))
        return _receipts(layers, codes, factors, row_sums, raw, count)
    except BaseException:
        _unmerge(layers, weights[0], factors[0], merged)
        for part in raw:
            _restore(layers, part)
        raise


def unmerge_(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> None:
    """Each weight as it was before the merge that wrote its receipt: one launch, and one for the raw weights."""
    factors = [receipt.factors for receipt in receipts]
    layers = _layers(weights, [receipt.code for receipt in receipts], factors)
    keys = [receipt.raw_index + first for receipt, first in zip(receipts, layers.first_weight, strict=False)]
    raw = Raw(torch.cat(keys), torch.cat([receipt.raw_values for receipt in receipts]))
    _unmerge(layers, weights[0], factors[0], layers.table.new_ones(layers.tiles, dtype=torch.int8))
    _restore(layers, raw)


def checksums(weights: Sequence[Tensor]) -> list[int]:
    """`peftk.reference.checksum` of each weight: one launch."""
    layers = _layers(weights, None, None)
    row_sums = layers.table.new_zeros(layers.rows, dtype=torch.int32)
    _sum_rows(layers, weights[0], row_sums)
    return _checksums(layers, row_sums)


def _layers(weights: Sequence[Tensor], codes: Sequence[Tensor] | None, factors: Sequence[Factors] | None) -> Layers:
    """codes and factors: None where only W is read."""
    block, _ = _block(weights[0])
    table: list[tuple[int, ...]] = []
    ends: list[int] = []
    scaling: list[float] = []
    first_weight = [0]
    tiles = rows = 0
    for i, weight in enumerate(weights):
        N, K = weight.shape
        code = A = B = rank = 0
        adapters = len(ends)
        if codes is not None and factors is not None:
            code, A, B = codes[i].data_ptr(), factors[i].lora_A.data_ptr(), factors[i].lora_B.data_ptr()
            rank = factors[i].ends[-1]
            ends += factors[i].ends
            scaling += factors[i].scaling
        across = triton.cdiv(K, block.BLOCK_K)
        vector = 16 // weight.itemsize
        aligned = weight.data_ptr() % 16 == 0 and all(v % vector == 0 for v in (weight.stride(0), K, code))
        table.append((
            weight.data_ptr(), weight.stride(0), N, K, code, A, B, rank, adapters, len(ends),
            across, tiles, rows, first_weight[-1], int(aligned),
        ))  # fmt: skip
        tiles += across * triton.cdiv(N, block.BLOCK_N)
        rows += N
        first_weight.append(first_weight[-1] + N * K)
    device = weights[0].device
    return Layers(
        torch.tensor(table, dtype=torch.int64, device=device),
        torch.tensor(ends, dtype=torch.int32, device=device),
        torch.tensor(scaling, dtype=torch.float32, device=device),
        tiles,
        rows,
        tuple(first_weight),
    )


def _merge(
    layers: Layers, weight: Tensor, factors: Factors, merged: Tensor, row_sums: Tensor, status: Tensor, raw: Raw
) -> None:
    block, options = _block(weight)
    with workspace.on(weight.device):
        merge_kernel[(layers.tiles,)](
            layers.table, layers.ends, layers.scaling, merged, row_sums, status[1:], status, *raw,
            len(layers.table), len(raw.keys),
            DTYPE=DTYPES[weight.dtype], ADAPTER_DTYPE=DTYPES[factors.lora_A.dtype], **block._asdict(), **options,
        )  # fmt: skip


def _unmerge(layers: Layers, weight: Tensor, factors: Factors, merged: Tensor) -> None:
    block, options = _block(weight)
    with workspace.on(weight.device):
        unmerge_kernel[(layers.tiles,)](
            layers.table, layers.ends, layers.scaling, merged, len(layers.table),
            DTYPE=DTYPES[weight.dtype], ADAPTER_DTYPE=DTYPES[factors.lora_A.dtype], **block._asdict(), **options,
        )  # fmt: skip


def _restore(layers: Layers, raw: Raw) -> None:
    count = len(raw.keys)
    if count:
        with workspace.on(raw.values.device):
            restore_kernel[(triton.cdiv(count, _RESTORED_AT_ONCE),)](
                layers.table, *raw, len(layers.table), count,
                DTYPE=DTYPES[raw.values.dtype], BLOCK=_RESTORED_AT_ONCE, num_warps=4,
            )  # fmt: skip


def _sum_rows(layers: Layers, weight: Tensor, row_sums: Tensor) -> None:
    block, options = _block(weight)
    with workspace.on(weight.device):
        checksum_kernel[(layers.tiles,)](
            layers.table, row_sums, len(layers.table), DTYPE=DTYPES[weight.dtype], **block._asdict(), **options
        )


def _receipts(
    layers: Layers,
    codes: Sequence[Tensor],
    factors: Sequence[Factors],
    row_sums: Tensor,
    raw: Sequence[Raw],
    count: int,
) -> list[MergeReceipt]:
    *full, last = raw
    keys, order = torch.cat([part.keys for part in full] + [last.keys[:count]]).sort()
    values = torch.cat([part.values for part in full] + [last.values[:count]])[order]
    bounds = torch.searchsorted(keys, torch.tensor(layers.first_weight, device=keys.device)).tolist()
    return [
        MergeReceipt(
            factors[i],
            codes[i],
            keys[bounds[i] : bounds[i + 1]] - layers.first_weight[i],
            values[bounds[i] : bounds[i + 1]].clone(),
            checksum,
        )
        for i, checksum in enumerate(_checksums(layers, row_sums))
    ]


def _checksums(layers: Layers, row_sums: Tensor) -> list[int]:
    """Σ_n ((n · _ODD) | 1) · row_sums[n], the row sums unsigned, modulo 2⁶⁴: int64 wraps around."""
    count, device = len(layers.table), row_sums.device
    rows, first_row = layers.table[:, FIELDS.index("N")], layers.table[:, FIELDS.index("first_row")]
    layer = torch.repeat_interleave(torch.arange(count, device=device), rows, output_size=layers.rows)
    n = torch.arange(layers.rows, device=device) - first_row[layer]
    shares = (row_sums.to(torch.int64) & 0xFFFFFFFF) * (n * _ODD | 1)
    totals = torch.zeros(count, dtype=torch.int64, device=device).index_add_(0, layer, shares)
    return [total & 0xFFFFFFFFFFFFFFFF for total in totals.tolist()]


def _empty_raw(weight: Tensor, room: int) -> Raw:
    return Raw(weight.new_full((room,), -1, dtype=torch.int64), weight.new_empty(room))


def _block(weight: Tensor) -> tuple[config.Merge, dict[str, int | bool]]:
    where = target(weight.device)
    return config.merge(where), config.exact_options(where)
