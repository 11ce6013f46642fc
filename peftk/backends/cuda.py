"""The CUDA C++ kernels of `peftk._cuda`. Docs: `docs/decode.md`, `docs/merge.md`, `docs/segments.md`.

Launches go to torch's current stream of the weight's device and return at once. Temporaries are
allocated on that stream, so the caching allocator gives their memory to nothing that could overtake the kernel.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

import peftk._cuda as _cuda
from peftk.adapters.adapter import PAGE, Adapter
from peftk.adapters.dropout import Dropout
from peftk.adapters.table import AdapterTable
from peftk.backends.call import LORA_LINEAR, MERGE, SEGMENTS, UNMERGE
from peftk.backends.contract import Backend
from peftk.launch import workspace
from peftk.launch.adapter_args import adapter_args, contiguous
from peftk.launch.merge_args import DTYPES
from peftk.launch.merge_layers import InPlace, Layers, Notes, Raw
from peftk.launch.segments import Segments, empty

if TYPE_CHECKING:
    from peftk.backends.call import Call

__all__ = [
    "backend",
    "cannot_run",
    "checksum",
    "checksums",
    "describe",
    "lora_linear",
    "merge_",
    "merge_layers_",
    "multi_lora_linear",
    "remerge_",
    "segments",
    "unmerge_",
    "unmerge_layers_",
]


_SERVED = (LORA_LINEAR, LORA_LINEAR._replace(many=True), MERGE, UNMERGE, SEGMENTS)


def backend() -> Backend:
    from peftk.backends import cuda

    return Backend(cuda, forward=cuda, merge=cuda, merge_layers=cuda, sort=cuda)


def cannot_run(call: Call) -> str | None:
    if _cuda.device == "cuda" and torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if call.op not in _SERVED:
        return f"no CUDA C++ kernel for {call.op}"
    if call.device != _cuda.device:
        return f"runs on {_cuda.device} tensors, not on {call.device}"
    if call.op == SEGMENTS:
        return _too_old()
    if call.op in (MERGE, UNMERGE):
        for name, dtype in (("weight", call.weight_dtype), ("adapter", call.adapter_dtype)):
            if dtype is not None and dtype not in DTYPES:
                return f"takes float32, bfloat16 and float16, {name} is {str(dtype).removeprefix('torch.')}"
        return _too_old()
    return _cannot_serve_linear(call)


def _cannot_serve_linear(call: Call) -> str | None:
    if call.x_dtype not in (torch.bfloat16, torch.float16) or call.weight_dtype != call.x_dtype:
        return f"needs x and weight both bfloat16 or both float16, got {call.x_dtype} and {call.weight_dtype}"
    if call.adapter_dtype not in (None, call.x_dtype, torch.float32):
        return f"needs adapters in {call.x_dtype} or float32, got {call.adapter_dtype}"
    if call.dropout:
        return "no dropout"
    if not 1 <= call.M <= _cuda.most_rows:
        return f"for 1 to {_cuda.most_rows} rows, got {call.M}"
    if call.K % 8 or call.K == 0 or not call.aligned:
        return "needs K a multiple of 8, and rows of weight that are contiguous and start at multiples of 16 bytes"
    return _too_old()


def _too_old() -> str | None:
    if _cuda.device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    return None


def describe(call: Call) -> str:
    """What a call launches, for `peftk.explain`."""
    if call.op == SEGMENTS:
        alone = _cuda.segments_workspace(call.M, call.adapters) == 0
        return "1 launch: segments_kernel" if alone else "3 launches: sort_kernel, scan_kernel, scatter_kernel"
    if call.op == MERGE:
        return "1 launch: merge_kernel, one pass over W, in place; for a list of layers the same one"
    if call.op == UNMERGE:
        return (
            "2 launches, for a list of layers the same two: unmerge_kernel, restore_kernel; sum_rows_kernel before them"
        )
    if _cuda.device == "cuda" and not torch.cuda.is_available():
        return "1 launch; its plan depends on the GPU, of which torch finds none here"
    device = torch.device(call.device)
    plan = _plan(call.M, call.N, call.K, call.slices * -(-call.rank // PAGE), workspace.processors(device))
    return (
        f"1 launch: {plan.shrink_tiles} shrink tiles, {plan.expand_tiles} expand tiles, W in {plan.expand_splits} "
        + ("split" if plan.expand_splits == 1 else "splits")
    )


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`peftk.reference.lora_linear` in one launch, up to 64 rows. The adapter's addresses travel as arguments."""
    args, tensors = adapter_args(adapter)
    given = tensors.any()
    if adapter is None or given is None:
        y, _ = _lora_linear(x, weight, bias, _cuda.Adapters.none(dtype=DTYPES[x.dtype]), 0, None, save_z=False)
        return y, None
    adapters = _cuda.Adapters.one(**args._asdict(), dtype=DTYPES[given.dtype])
    y, z = _lora_linear(x, weight, bias, adapters, -(-adapter.rank // PAGE), None, save_z=save_z)
    return y, z[:, : adapter.rank] if save_z and adapter.rank else None


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    *,
    dropout: Dropout | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`peftk.reference.multi_lora_linear` in one launch, up to 64 rows. Blocks sort the ids themselves."""
    adapters = _adapters(table)
    y, z = _lora_linear(
        x, weight, bias, adapters, table.slice_pages[-1], ids.to(torch.int32).contiguous(), save_z=save_z
    )
    return y, z if save_z else None


# A table never changes, so what the launcher derives from it is derived once, and dropped with the table.
_ADAPTERS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _adapters(table: AdapterTable) -> _cuda.Adapters:
    """The table as the launcher takes it."""
    found = _ADAPTERS.get(table)
    if found is None:
        found = _ADAPTERS[table] = _cuda.Adapters.of_table(
            pages=table.pages.data_ptr(),
            rows=table.rows.data_ptr(),
            scaling=table.scaling.data_ptr(),
            biases=table.biases.data_ptr(),
            slices=0 if table.ends is None else table.ends.data_ptr(),
            slice_count=table.slices,
            count=table.count,
            z_pages=table.slice_pages[-1],
            dtype=DTYPES[table.dtype],
        )
    return found


@functools.lru_cache(maxsize=4096)
def _plan(M: int, N: int, K: int, z_pages: int, processors: int) -> _cuda.LoraLinearPlan:
    return _cuda.plan_lora_linear(M, N, K, z_pages, processors)


def _lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapters: _cuda.Adapters,
    z_pages: int,
    ids: Tensor | None,
    *,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    """y [M, N], and z [M, 16 · z_pages], whole if it is saved."""
    assert weight is not None  # it serves no series adapter
    (M, K), N, device = x.shape, weight.shape[0], x.device
    if x.stride(1) != 1 or (x.data_ptr() | x.stride(0) * x.element_size()) % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    bias = contiguous(bias)
    plan = _plan(M, N, K, z_pages, workspace.processors(device))
    y = torch.empty(M, N, dtype=x.dtype, device=device)
    z = torch.empty(M, z_pages * PAGE, dtype=torch.float32, device=device)
    partials = torch.empty(plan.partials, dtype=torch.float32, device=device) if plan.partials else None
    with workspace.counters(device, plan.counters) as counters:
        _cuda.lora_linear(
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            weight.stride(0),
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPES[bias.dtype],
            y.data_ptr(),
            z.data_ptr(),
            save_z,
            0 if ids is None else ids.data_ptr(),
            adapters,
            M,
            N,
            K,
            DTYPES[x.dtype],
            plan,
            0 if partials is None else partials.data_ptr(),
            counters.data_ptr(),
            *_here(device),
        )
    return y, z


def _here(device: torch.device) -> tuple[int, int]:
    """The device's number and torch's current stream of it, for a launch."""
    if device.type == "cpu":  # the module that tests compile for the host
        return 0, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _list(layers: Layers) -> tuple[int, int, int, int, int, int, int]:
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
    rows, columns, _ = _cuda.merge_tile(DTYPES[dtype])
    return rows, columns


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
    room = torch.empty(_cuda.segments_workspace(M, adapters), dtype=torch.int32, device=device)
    order, sorted_ids, ends, starts, owners, blocks = (tensor.data_ptr() for tensor in found)
    _cuda.segments(
        ids.data_ptr(),
        ids.stride(0),
        ids.dtype == torch.int64,
        M,
        adapters,
        order,
        sorted_ids,
        ends,
        starts,
        owners,
        blocks,
        room.data_ptr(),
        *_here(device),
    )
    return found
