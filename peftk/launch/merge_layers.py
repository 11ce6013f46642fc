"""Merges and unmerges a list of layers in place, for the backends that do it in one launch.

    merge     t ← fma over ascending ranks from +0,  d ← Σ fl(s·t) in order,  W' = round(fl(W + d));  code, raw weights
    unmerge   W″ = round(fl(W' - d)), then the code and the raw weights bring W back

All weights of a call share one dtype, all adapters share one, and everything is on one device. Shapes, ranks and
strides differ by layer; rows are contiguous. A backend provides the launches (`InPlace`). `docs/merge.md` derives the
arithmetic.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftk.launch.merge_args import NotFiniteError, in_rows, rows, write
from peftk.reference.merge import Factors
from peftk.reference.receipt import MergeReceipt, code_as_bytes, pack_receipt

# A row of the table, int64. Rows of W are contiguous, code [N, K], A [R, K] and B [N, R] dense.
FIELDS = (
    "weight",  # address
    "stride",  # elements from row to row
    "N",
    "K",
    "code",  # address
    "lora_A",  # address
    "lora_B",  # address
    "R",  # the sum over the layer's adapters
    "first_adapter",  # in `ends` and `scaling`
    "end_adapter",
    "tiles_across",
    "first_tile",  # the number of tiles, rows and weights in the layers before it
    "first_row",
    "first_weight",
    "aligned",  # 1 if W's rows start at multiples of 16 bytes, and rows of the code at multiples of that many elements
)

_WEIGHTS_PER_RAW_SLOT = 256  # memory is reserved for one raw weight in 256, several times what usual adapters need
_CHECKSUM_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # as int64


class Layers(NamedTuple):
    """The layers of a call as the kernels read them. It holds addresses: the caller keeps the tensors alive."""

    table: Tensor  # int64 [layers, FIELDS]
    ends: Tensor  # int32 [adapters of all layers]: the rank after the adapter's last, within its layer
    scaling: Tensor  # float32 [adapters of all layers]
    tiles: int
    rows: int
    first_weight: tuple[int, ...]  # of each layer, and after the last
    dtype: torch.dtype
    adapter_dtype: torch.dtype  # where there are adapters

    @property
    def device(self) -> torch.device:
        return self.table.device


class Notes(NamedTuple):
    """What a merge writes besides W' and the code; all zero before the launch. A merged tile is not merged again."""

    merged: Tensor  # int8 [tiles]: 1 if the tile is merged
    row_sums: Tensor  # int32 [rows]: of W', for the checksum
    status: Tensor  # int32 [1 + layers]: the number of raw weights; then per layer, 1 if W' would not be finite


class Raw(NamedTuple):
    """Raw weights in any order. A key is the index over the weights of all layers; -1: an empty slot."""

    keys: Tensor
    values: Tensor


class InPlace(NamedTuple):
    """A backend's launches, each for all layers of a call, and merge, unmerge and remerge built on them.

    merge: merges the tiles that are not merged yet. It leaves a tile unchanged if W' would not be finite, or if its raw
    weights find no free slot (`status[0]` then says how many slots are needed). unmerge: takes which tiles are merged;
    raw weights come out as W″. restore: writes the raw weights back. sum_rows: computes the checksum's row sums [rows].
    """

    tile: Callable[[torch.dtype, torch.device], tuple[int, int]]  # rows and columns of W
    merge: Callable[[Layers, Notes, Raw], None]
    unmerge: Callable[[Layers, Tensor], None]
    restore: Callable[[Layers, Raw], None]
    sum_rows: Callable[[Layers, Tensor], None]

    def merge_layers_(self, weights: Sequence[Tensor], factors: Sequence[Factors]) -> list[MergeReceipt]:
        """Merges all or none: raises NotFiniteError if a W' would not be finite."""
        with in_rows(weights) as W:
            return self._merge(W, factors)

    def merge_(self, weight: Tensor, factors: Factors) -> MergeReceipt:
        return self.merge_layers_([weight], [factors])[0]

    def unmerge_layers_(self, weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> None:
        with in_rows(weights) as W:
            self._unmerge(W, receipts)

    def unmerge_(self, weight: Tensor, receipt: MergeReceipt) -> None:
        self.unmerge_layers_([weight], [receipt])

    def remerge_(self, weight: Tensor, receipt: MergeReceipt, factors: Factors) -> MergeReceipt:
        """Works in a copy that is written to W at the end, so no forward in between sees the unmerged weight."""
        W = weight.clone(memory_format=torch.contiguous_format)
        self._unmerge([W], [receipt])
        (new,) = self._merge([W], [factors])
        write(weight, W)
        return new

    def checksums(self, weights: Sequence[Tensor]) -> list[int]:
        """`peftk.reference.merge.checksum` of each weight: one launch."""
        W = [rows(weight) for weight in weights]
        layers = self._layers(W, None, None)
        row_sums = torch.zeros(layers.rows, dtype=torch.int32, device=layers.device)
        self.sum_rows(layers, row_sums)
        return _checksums(layers, row_sums)

    def checksum(self, weight: Tensor) -> int:
        return self.checksums([weight])[0]

    def _merge(self, weights: Sequence[Tensor], factors: Sequence[Factors]) -> list[MergeReceipt]:
        """Restores all weights before it raises anything."""
        codes = [w.new_empty(w.shape, dtype=torch.int8) for w in weights]
        layers = self._layers(weights, codes, factors)
        notes = _notes(layers)
        capacity = min(layers.first_weight[-1] // _WEIGHTS_PER_RAW_SLOT + 1024, layers.first_weight[-1])
        raw = [_empty_raw(layers, capacity)]
        try:
            self.merge(layers, notes, raw[0])
            count, *refused = notes.status.tolist()
            if not any(refused) and count > capacity:
                # tiles without slots for their raw weights were left unmerged: merge these again, with enough slots
                raw = [raw[0], _empty_raw(layers, count)]
                notes.status[0] = 0
                self.merge(layers, notes, raw[1])
                count, *refused = notes.status.tolist()
            if any(refused):
                raise NotFiniteError(refused.index(1))
            return _receipts(layers, codes, factors, notes.row_sums, raw, count)
        except BaseException:
            self.unmerge(layers, notes.merged)
            for part in raw:
                self.restore(layers, part)
            raise

    def _unmerge(self, weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> None:
        """Each weight as before the merge that wrote its receipt: one launch, and one for the raw weights."""
        codes, places = zip(*(code_as_bytes(receipt) for receipt in receipts), strict=True)
        layers = self._layers(weights, codes, [receipt.factors for receipt in receipts])
        keys = [index + first for index, first in zip(places, layers.first_weight, strict=False)]
        raw = Raw(torch.cat(keys), torch.cat([receipt.raw_values for receipt in receipts]))
        self.unmerge(layers, torch.ones(layers.tiles, dtype=torch.int8, device=layers.device))
        self.restore(layers, raw)

    def _layers(
        self, weights: Sequence[Tensor], codes: Sequence[Tensor] | None, factors: Sequence[Factors] | None
    ) -> Layers:
        """codes and factors: None if only W is read."""
        dtype, device = weights[0].dtype, weights[0].device
        tile_rows, tile_columns = self.tile(dtype, device)
        table, ends, scaling = array("q"), array("i"), array("f")
        first_weight = [0]
        tiles = first_row = 0
        for i, weight in enumerate(weights):
            N, K = weight.shape
            if max(N, K) > _MAX_SIZE:
                raise ValueError(f"weight: expected at most {_MAX_SIZE} rows and columns, got {[N, K]}")
            code = A = B = rank = 0
            first_adapter = len(ends)
            if codes is not None and factors is not None:
                code, A, B = codes[i].data_ptr(), factors[i].lora_A.data_ptr(), factors[i].lora_B.data_ptr()
                rank = factors[i].ends[-1]
                ends.extend(factors[i].ends)
                scaling.extend(factors[i].scaling)
            across = -(-K // tile_columns)
            vector = 16 // weight.itemsize
            aligned = weight.data_ptr() % 16 == 0 and all(v % vector == 0 for v in (weight.stride(0), K, code))
            table.extend((
                weight.data_ptr(), weight.stride(0), N, K, code, A, B, rank, first_adapter, len(ends),
                across, tiles, first_row, first_weight[-1], int(aligned),
            ))  # fmt: skip
            tiles += across * -(-N // tile_rows)
            first_row += N
            first_weight.append(first_weight[-1] + N * K)
        # a single copy to the device for all three
        packed_bytes = b"".join(
            part.tobytes() + bytes(-len(part) * part.itemsize % _ALIGNMENT) for part in (table, ends, scaling)
        )
        buffer = torch.frombuffer(bytearray(packed_bytes), dtype=torch.uint8).to(device)
        on_device = _split_memory(
            buffer, (torch.int64, len(table)), (torch.int32, len(ends)), (torch.float32, len(scaling))
        )
        return Layers(
            on_device[0].view(len(weights), len(FIELDS)),
            on_device[1],
            on_device[2],
            tiles,
            first_row,
            tuple(first_weight),
            dtype,
            dtype if factors is None else factors[0].lora_A.dtype,
        )


_MAX_SIZE = 2**31 - 2**16  # kernels index rows and columns in int32, up to the end of the last tile
_ALIGNMENT = 16  # bytes; Triton specialises kernels for such addresses


def _split_memory(buffer: Tensor, *parts: tuple[torch.dtype, int]) -> list[Tensor]:
    """Tensors of these dtypes and lengths, one after another in `buffer` (uint8)."""
    carved, at = [], 0
    for dtype, count in parts:
        nbytes = count * dtype.itemsize
        carved.append(buffer[at : at + nbytes].view(dtype))
        at += nbytes + -nbytes % _ALIGNMENT
    return carved


def _notes(layers: Layers) -> Notes:
    """Zeroed notes, all in one buffer."""
    parts = ((torch.int8, layers.tiles), (torch.int32, layers.rows), (torch.int32, 1 + len(layers.table)))
    nbytes = sum(count * dtype.itemsize + _ALIGNMENT for dtype, count in parts)
    return Notes(*_split_memory(torch.zeros(nbytes, dtype=torch.uint8, device=layers.device), *parts))


def _empty_raw(layers: Layers, capacity: int) -> Raw:
    keys = torch.full((capacity,), -1, dtype=torch.int64, device=layers.device)
    return Raw(keys, torch.empty(capacity, dtype=layers.dtype, device=layers.device))


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
        pack_receipt(factors[i], codes[i], values[bounds[i] : bounds[i + 1]].clone(), checksum)
        for i, checksum in enumerate(_checksums(layers, row_sums))
    ]


def _checksums(layers: Layers, row_sums: Tensor) -> list[int]:
    """Σ_n ((n · _CHECKSUM_MULTIPLIER) | 1) · row_sums[n], the row sums unsigned, modulo 2⁶⁴: int64 wraps around."""
    count, device = len(layers.table), row_sums.device
    heights, first_row = layers.table[:, FIELDS.index("N")], layers.table[:, FIELDS.index("first_row")]
    layer = torch.repeat_interleave(torch.arange(count, device=device), heights, output_size=layers.rows)
    n = torch.arange(layers.rows, device=device) - first_row[layer]
    shares = (row_sums.to(torch.int64) & 0xFFFFFFFF) * (n * _CHECKSUM_MULTIPLIER | 1)
    totals = torch.zeros(count, dtype=torch.int64, device=device).index_add_(0, layer, shares)
    return [total & 0xFFFFFFFFFFFFFFFF for total in totals.tolist()]
