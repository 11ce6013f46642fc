"""The CUDA C++ kernels of `peftk._cuda`: merge, unmerge and segments. Docs: `docs/merge.md`, `docs/segments.md`.

Launches go to torch's current stream of the weight's device and return at once. Temporaries are
allocated on that stream, so the caching allocator gives their memory to nothing that could overtake the kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import peftk._cuda as _cuda
from peftk.backends.merge_args import DTYPES
from peftk.backends.merge_layers import InPlace, Layers, Notes, Raw
from peftk.backends.segments import Segments, empty

if TYPE_CHECKING:
    from peftk.backends import Call

__all__ = [
    "cannot_serve",
    "checksum",
    "checksums",
    "describe",
    "merge_",
    "merge_layers_",
    "remerge_",
    "segments",
    "unmerge_",
    "unmerge_layers_",
]


def cannot_serve(call: Call) -> str | None:
    if call.op not in ("merge", "segments", "unmerge"):
        return f"has merge, unmerge and segments, no CUDA C++ kernel for {call.op}"
    if call.device != _cuda.device:
        return f"runs on {_cuda.device} tensors, not on {call.device}"
    if call.op == "segments":
        return None
    for name, dtype in (("weight", call.weight_dtype), ("adapter", call.adapter_dtype)):
        if dtype is not None and dtype not in DTYPES:
            return f"serves float32, bfloat16 and float16, {name} is {str(dtype).removeprefix('torch.')}"
    return None


def describe(call: Call) -> str:
    """What a call launches, for `peftk.explain`."""
    if call.op == "segments":
        one = _cuda.segments_workspace(call.M, call.adapters) == 0
        return "1 launch: segments_kernel" if one else "3 launches: sort_kernel, scan_kernel, scatter_kernel"
    if call.op == "merge":
        return "1 launch: merge_kernel, one pass over W, in place; for a list of layers the same one"
    return "2 launches, for a list of layers the same two: unmerge_kernel, restore_kernel; sum_rows_kernel before them"


def _here(device: torch.device) -> tuple[int, int]:
    """The device's number and torch's current stream of it, for a launch."""
    if device.type == "cpu":  # the module that tests compile for the host
        return 0, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _list(layers: Layers) -> tuple[int, ...]:
    """The layers as all launches of merge take them."""
    return (
        layers.table.data_ptr(),
        layers.ends.data_ptr(),
        layers.scaling.data_ptr(),
        len(layers.table),
        layers.tiles,
        DTYPES[layers.dtype],
        DTYPES[layers.adapter_dtype],
    )


def _tile(dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    return _cuda.merge_tile(DTYPES[dtype])


def _merge(layers: Layers, notes: Notes, raw: Raw) -> None:
    merged, row_sums, status = (note.data_ptr() for note in notes)
    refused, raw_count = status + 4, status
    places = (merged, row_sums, refused, raw_count, raw.keys.data_ptr(), raw.values.data_ptr(), len(raw.keys))
    _cuda.merge(*_list(layers), *places, *_here(layers.device))


def _unmerge(layers: Layers, merged: Tensor) -> None:
    _cuda.unmerge(*_list(layers), merged.data_ptr(), *_here(layers.device))


def _restore(layers: Layers, raw: Raw) -> None:
    values = (raw.keys.data_ptr(), raw.values.data_ptr(), len(raw.keys))
    _cuda.merge_restore(*_list(layers), *values, *_here(layers.device))


def _sum_rows(layers: Layers, row_sums: Tensor) -> None:
    _cuda.merge_sum_rows(*_list(layers), row_sums.data_ptr(), *_here(layers.device))


_in_place = InPlace(_tile, _merge, _unmerge, _restore, _sum_rows)
merge_, merge_layers_ = _in_place.merge_, _in_place.merge_layers_
unmerge_, unmerge_layers_ = _in_place.unmerge_, _in_place.unmerge_layers_
remerge_, checksum, checksums = _in_place.remerge_, _in_place.checksum, _in_place.checksums


def segments(ids: Tensor, adapters: int) -> Segments:
    """`peftk.reference.segments` in one launch for up to 1,024 rows, in three beyond."""
    M, device = ids.shape[0], ids.device
    found = empty(M, adapters, device)
    workspace = torch.empty(_cuda.segments_workspace(M, adapters), dtype=torch.int32, device=device)
    _cuda.segments(
        ids.data_ptr(),
        ids.stride(0),
        ids.dtype == torch.int64,
        M,
        adapters,
        *(table.data_ptr() for table in found),
        workspace.data_ptr(),
        *_here(device),
    )
    return found
