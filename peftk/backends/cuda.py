"""The CUDA C++ kernels of `peftk._cuda`. Docs: `docs/decode.md`, `docs/merge.md`, `docs/segments.md`.

Launches go to torch's current stream on the device of the inputs, and return at once. Temporaries are allocated on that
stream, so torch's caching allocator reuses their memory only for work that runs after the kernel.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import peftk._cuda as _cuda
from peftk.adapters.activations import CODES
from peftk.adapters.adapter import PAGE, Adapter, pages_of
from peftk.adapters.dropout import Dropout
from peftk.adapters.table import AdapterTable
from peftk.backends import choice, determinism
from peftk.backends.call import LORA_LINEAR, MERGE, SEGMENTS, UNMERGE, Call
from peftk.backends.contract import Backend
from peftk.launch import workspace
from peftk.launch.adapter_args import adapter_args, contiguous
from peftk.launch.merge_args import DTYPES
from peftk.launch.merge_layers import InPlace, Layers, Notes, Raw
from peftk.launch.segments import Segments, empty
from peftk.system import storage, streams

__all__ = [
    "backend",
    "cannot_run",
    "checksum",
    "checksums",
    "describe",
    "direct_lora_linear",
    "direct_multi_lora_linear",
    "lora_linear",
    "merge_",
    "merge_layers_",
    "multi_lora_linear",
    "remerge_",
    "segments",
    "unmerge_",
    "unmerge_layers_",
]


storage.register_plain_tensors(_cuda.plain_tensors)

_OPS = (LORA_LINEAR, LORA_LINEAR._replace(many=True), MERGE, UNMERGE, SEGMENTS)


def backend() -> Backend:
    from peftk.backends import cuda

    return Backend(cuda, forward=cuda, direct=cuda, direct_multi=cuda, merge=cuda, merge_layers=cuda, sort=cuda)


def cannot_run(call: Call) -> str | None:
    if _cuda.device == "cuda" and torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if call.op not in _OPS:
        return f"no CUDA C++ kernel for {call.op}"
    if call.device != _cuda.device:
        return f"runs on {_cuda.device} tensors, not on {call.device}"
    if call.op == SEGMENTS:
        return _capability_problem()
    if call.op in (MERGE, UNMERGE):
        for name, dtype in (("weight", call.weight_dtype), ("adapter", call.adapter_dtype)):
            if dtype is not None and dtype not in DTYPES:
                return f"takes float32, bfloat16 and float16, {name} is {str(dtype).removeprefix('torch.')}"
        return _capability_problem()
    return _cannot_run_linear(call)


def _cannot_run_linear(call: Call) -> str | None:
    if call.x_dtype not in (torch.bfloat16, torch.float16) or call.weight_dtype != call.x_dtype:
        return f"needs x and weight both bfloat16 or both float16, got {call.x_dtype} and {call.weight_dtype}"
    if call.adapter_dtype not in (None, call.x_dtype, torch.float32):
        return f"needs adapters in {call.x_dtype} or float32, got {call.adapter_dtype}"
    if call.dropout:
        return "no dropout"
    if not 1 <= call.M <= _cuda.most_rows:
        return f"runs 1 to {_cuda.most_rows} rows, got {call.M}"
    if call.K % 8 or call.K == 0 or not call.aligned:
        return "needs K a multiple of 8, and rows of weight that are contiguous and start at multiples of 16 bytes"
    return _capability_problem()


def _capability_problem() -> str | None:
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
        return "1 launch; its plan depends on the GPU, and torch finds none here"
    device = torch.device(call.device)
    plan = _plan(call.M, call.N, call.K, call.slices * pages_of(call.rank), workspace.processors(device))
    return (
        f"1 launch: {plan.shrink_tiles} shrink tiles, {plan.expand_tiles} expand tiles, W in {plan.expand_splits} "
        + ("split" if plan.expand_splits == 1 else "splits")
    )


def direct_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: str,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
    limit: int,
) -> Tensor | None:
    """y with a fraction of `lora_linear`'s overhead; None if it is not chosen, or cannot take the call as it is.

    That also holds in a capture, and for the first call in a stream, which makes its counters.
    """
    around = None if weight is None else _surroundings(x.device)
    if weight is None or around is None:
        return None
    adapter = (lora_A, lora_B, scaling, CODES[activation], bias_A, bias_B)
    try:
        with workspace.launching(x.device, around[2]):
            return _cuda.direct_lora_linear(x, weight, bias, *adapter, _is_chosen, *around)
    except BaseException:
        workspace.forget(x.device)
        raise


def direct_multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: AdapterTable, ids: Tensor, limit: int
) -> Tensor | None:
    """The same for many adapters, with int32 ids for each row, such as those of a route."""
    around = _surroundings(x.device)
    if around is None or table.dtype not in DTYPES:
        return None
    try:
        with workspace.launching(x.device, around[2]):
            return _cuda.direct_multi_lora_linear(
                x, weight, bias, ids, _table_adapters(table), _about(table), _is_chosen, *around
            )
    except BaseException:
        workspace.forget(x.device)
        raise


def _surroundings(device: torch.device) -> tuple[Tensor | None, int, int] | None:
    """The current stream's counters, if it has any, the number of processors, and the stream; None in a capture."""
    if streams.capturing(device) or determinism.is_deterministic():
        return None
    stream = streams.handle(device)
    return workspace.of_stream(device, stream), workspace.processors(device), stream


_About = tuple[bool, int, int, int, int]  # many, the adapters' dtype or -1, the largest rank, how many, slices


def _about(table: AdapterTable) -> _About:
    """What the choice depends on of a table, cached."""
    about: _About | None = table.derived.get(_about)
    if about is None:
        about = (True, DTYPES[table.dtype], table.max_rank, table.count, table.slices)
        table.derived[_about] = about
    return about


@choice.remembered
def _is_chosen(M: int, N: int, K: int, dtype: int, about: _About) -> bool:
    """Whether this backend is the one for such a call."""
    many, adapter_dtype, rank, adapters, slices = about
    call = Call(
        op=LORA_LINEAR._replace(many=many),
        device=_cuda.device,
        x_dtype=_DTYPES[dtype],
        weight_dtype=_DTYPES[dtype],
        adapter_dtype=_DTYPES.get(adapter_dtype),
        M=M,
        K=K,
        N=N,
        rank=rank,
        adapters=adapters,
        slices=slices,
    )
    return choice.unforced(call) == "cuda"


_DTYPES = {code: dtype for dtype, code in DTYPES.items()}


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`peftk.reference.lora_linear.lora_linear` in one launch, up to 64 rows.

    The adapter's addresses are kernel arguments.
    """
    args, tensors = adapter_args(adapter)
    any_tensor = tensors.any()
    if adapter is None or any_tensor is None:
        y, _ = _lora_linear(x, weight, bias, _cuda.Adapters.none(dtype=DTYPES[x.dtype]), 0, None, save_z=False)
        return y, None
    adapters = _cuda.Adapters.one(**args._asdict(), dtype=DTYPES[any_tensor.dtype])
    y, z = _lora_linear(x, weight, bias, adapters, pages_of(adapter.rank), None, save_z=save_z)
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
    """`peftk.reference.lora_linear.multi_lora_linear` in one launch, up to 64 rows. The kernel sorts the ids itself."""
    adapters = _table_adapters(table)
    y, z = _lora_linear(
        x, weight, bias, adapters, table.slice_pages[-1], ids.to(torch.int32).contiguous(), save_z=save_z
    )
    return y, z if save_z else None


def _table_adapters(table: AdapterTable) -> _cuda.Adapters:
    """The table as kernel arguments, cached."""
    adapters: _cuda.Adapters | None = table.derived.get(_table_adapters)
    if adapters is None:
        adapters = table.derived[_table_adapters] = _cuda.Adapters.of_table(
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
    return adapters


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
    """y [M, N], and z [M, 16 · z_pages], complete only if save_z."""
    assert weight is not None  # `cannot_run` refuses series adapters
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
            *_device_and_stream(device),
        )
    return y, z


def _device_and_stream(device: torch.device) -> tuple[int, int]:
    """The device's index and its current torch stream, for a launch."""
    if device.type == "cpu":  # tests compile the module for the host
        return 0, 0
    return device.index, streams.handle(device)


def _layer_args(layers: Layers) -> tuple[int, int, int, int, int, int, int]:
    """The layers as arguments of the merge launches."""
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
    outputs = (merged, row_sums, refused, raw_count, raw.keys.data_ptr(), raw.values.data_ptr(), len(raw.keys))
    _cuda.merge(*_layer_args(layers), *outputs, *_device_and_stream(layers.device))


def _unmerge(layers: Layers, merged: Tensor) -> None:
    _cuda.unmerge(*_layer_args(layers), merged.data_ptr(), *_device_and_stream(layers.device))


def _restore(layers: Layers, raw: Raw) -> None:
    values = (raw.keys.data_ptr(), raw.values.data_ptr(), len(raw.keys))
    _cuda.merge_restore(*_layer_args(layers), *values, *_device_and_stream(layers.device))


def _sum_rows(layers: Layers, row_sums: Tensor) -> None:
    _cuda.merge_sum_rows(*_layer_args(layers), row_sums.data_ptr(), *_device_and_stream(layers.device))


_in_place = InPlace(_tile, _merge, _unmerge, _restore, _sum_rows)
merge_, merge_layers_ = _in_place.merge_, _in_place.merge_layers_
unmerge_, unmerge_layers_ = _in_place.unmerge_, _in_place.unmerge_layers_
remerge_, checksum, checksums = _in_place.remerge_, _in_place.checksum, _in_place.checksums


def segments(ids: Tensor, adapters: int) -> Segments:
    """`peftk.reference.segments`: one launch up to 1,024 rows, three for more."""
    M, device = ids.shape[0], ids.device
    result = empty(M, adapters, device)
    scratch = torch.empty(_cuda.segments_workspace(M, adapters), dtype=torch.int32, device=device)
    order, sorted_ids, ends, starts, owners, blocks = (tensor.data_ptr() for tensor in result)
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
        scratch.data_ptr(),
        *_device_and_stream(device),
    )
    return result
