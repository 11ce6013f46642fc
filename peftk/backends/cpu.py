"""The C++ SIMD kernels of `peftk._cpu`, the default on a CPU. Docs: `docs/cpu.md`.

The functions have the contract's signatures, plus `base`, the result so far. Tensors are read in place, except for
those that are copied first: x, dy, and z of many adapters, where their rows are not contiguous; a weight that is
contiguous along neither dimension; one adapter of several pages, or with rows of A that are not contiguous; ids that
are not contiguous; x or dy of a series adapter, to which its part is added. Outputs are made with `x.new_empty`,
because users may change torch's default device and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import peftk._cpu as _cpu
from peftk.adapters.activations import CODES
from peftk.adapters.adapter import ALL, Adapter, AdapterGrads, Wanted
from peftk.adapters.dropout import Dropout
from peftk.adapters.table import AdapterTable
from peftk.backends import blocking, determinism, packed
from peftk.backends.contract import Backend
from peftk.launch.merge_args import DTYPES, NotFiniteError, in_rows, rows
from peftk.quantized.weight import QuantizedWeight
from peftk.reference.merge import Factors
from peftk.reference.receipt import MergeReceipt, code_as_halves

if TYPE_CHECKING:
    from peftk.backends.call import Call

_NO_ADAPTER = _cpu.Adapters.none(dtype=DTYPES[torch.float32])


def backend() -> Backend:
    from peftk.backends import cpu

    return Backend(
        cpu,
        forward=cpu,
        backward=cpu,
        direct=cpu,
        direct_multi=cpu,
        merge=cpu,
        batch_invariant=True,
        checks_ids=True,
        quantized=packed.FORMATS,
    )


def cannot_run(call: Call) -> str | None:
    if call.device != "cpu":
        return f"runs on cpu tensors, not on {call.device}"
    if call.op.kind == "segments":
        return "does not sort rows: its kernels read them in any order"
    if call.packing is not None and (reason := packed.cannot_read(call.packing, call.K, call.slices)):
        return reason
    for name, dtype in (("x", call.x_dtype), ("weight", call.weight_dtype), ("adapter", call.adapter_dtype)):
        if dtype is not None and dtype not in DTYPES:
            return f"takes float32, bfloat16 and float16, {name} is {str(dtype).removeprefix('torch.')}"
    if call.slices > 1 and call.op.backward:
        return "no C++ backward for packed outputs whose slices have their own adapters"
    return None


def describe(call: Call) -> str:
    """Which kernels run a call, for `peftk.explain`. Assumes a row-major weight."""
    threads = torch.get_num_threads()
    if call.op.kind in ("merge", "unmerge"):
        return f"C++ merge kernels at SIMD level {simd_level()}, {_thread_count(threads)} at most"
    if call.op.kind == "adapter_block":
        return f"a copy of x, then the C++ kernels' adapters, {simd_level()}, {_thread_count(threads)}"
    linear = _cpu.Linear.of(
        M=call.M,
        N=call.N,
        K=call.K,
        x=0,
        x_stride=call.K,
        x_dtype=DTYPES[call.x_dtype],
        weight=0,
        weight_n=call.K,
        weight_k=1,
        weight_dtype=DTYPES[torch.float32 if call.packing else call.weight_dtype],
        packing=packed.plan(call.packing, call.K),
        batch_invariant=determinism.is_batch_invariant(),
        threads=threads,
    )
    form, pairs, threads = _cpu.plan(linear, backward=call.op.backward)
    level = f"{simd_level()} (bf16 pairs)" if pairs else simd_level()
    form = f"{form} form" if call.packing is None else f"{form} form, {call.packing.format} decoded in it"
    return f"C++ lora_linear kernels: {form}, {level}, {_thread_count(threads)}"


def _thread_count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def simd_level() -> str:
    """The SIMD level in use: the one named by PEFTK_SIMD, else the best of this machine."""
    return _cpu.simd_level()


def simd_levels() -> list[str]:
    """The SIMD levels that both this build and this machine have, ascending."""
    return _cpu.simd_levels()


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapter: Adapter | None,
    *,
    dropout: Dropout | None = None,
    save_z: bool = False,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """base: y [M, N], contiguous, if xWᵀ + bias is already computed; the adapter is then added to it in place."""
    x, weight, adapter = rows(x), _dense_weight(weight), _one_page(adapter)
    M, K = x.shape
    N = K if weight is None else weight.shape[0]
    base = x.clone(memory_format=torch.contiguous_format) if weight is None else base
    y = x.new_empty(M, N) if base is None else base
    z = x.new_empty(M, adapter.rank, dtype=torch.float32) if save_z and adapter is not None and adapter.rank else None
    _cpu.lora_linear(
        _linear_args((M, N, K), x, x.dtype, weight, bias, dropout, over_base=base is not None),
        _adapter_args(adapter),
        y=y.data_ptr(),
        y_stride=N,
        z=0 if z is None else z.data_ptr(),
        z_stride=0 if z is None else z.shape[1],
    )
    return y, z


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
    """y with a fraction of `lora_linear`'s overhead; None if a tensor is not a plain one, or M·N·K > limit.

    weight None: the identity, y = x + the adapter, of any size.
    """
    adapter = (lora_A, lora_B, scaling, CODES[activation], bias_A, bias_B)
    threads, invariant = torch.get_num_threads(), determinism.ever_entered and determinism.is_batch_invariant()
    return _cpu.direct_lora_linear(x, weight, bias, *adapter, limit, threads, invariant)


def direct_multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: AdapterTable, ids: Tensor, limit: int
) -> Tensor | None:
    """`direct_lora_linear` for many adapters; ids as users pass them. Raises ValueError for an id outside the table."""
    if table.dtype not in DTYPES:  # fp64
        return None
    threads, invariant = torch.get_num_threads(), determinism.ever_entered and determinism.is_batch_invariant()
    addresses = table.derived.get(_table_addresses) or _table_addresses(table)
    return _cpu.direct_multi_lora_linear(x, weight, bias, ids, limit, threads, invariant, *addresses)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    *,
    dropout: Dropout | None = None,
    save_z: bool = False,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """base: as in `lora_linear`, or with any row stride; weight and bias are then not read and may be None.

    Packed outputs are one call a slice, each of which writes its columns of y.
    """
    x, weight, ids = rows(x), _dense_weight(weight), _ids(ids)
    M, K = x.shape
    if base is None and weight is None:
        base = x.clone(memory_format=torch.contiguous_format)
    y = x.new_empty(M, weight.shape[0]) if base is None and weight is not None else base
    assert y is not None
    # zeros: rows of smaller rank write only a part
    z = x.new_zeros(M, table.z_width, dtype=torch.float32) if save_z else None
    packed = _packed_rows(table)
    for slice in range(table.slices):
        start, end = table.columns_of(slice * table.count, y.shape[1])
        W, b = None, None
        if base is None and weight is not None:
            W, b = (weight, bias) if table.slices == 1 else (weight[start:end], _part(bias, start, end))
        _cpu.lora_linear(
            _linear_args((M, end - start, K), x, x.dtype, W, b, dropout, over_base=base is not None),
            _table_args(table, slice, packed),
            ids=ids.data_ptr(),
            y=y.data_ptr() + start * y.element_size(),
            y_stride=y.stride(0),
            z=0 if z is None else z.data_ptr() + table.z_from(slice * table.count) * z.element_size(),
            z_stride=0 if z is None else z.shape[1],
        )
    return y, z


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter | None,
    z: Tensor | None,
    *,
    dropout: Dropout | None = None,
    need_dx: bool = True,
    wanted: Wanted = ALL,
    base: Tensor | None = None,
) -> tuple[Tensor | None, AdapterGrads]:
    """base: dx [M, K], contiguous, if dY W is already computed; the adapter's part is then added to it in place."""
    dy, weight, adapter = rows(dy), _dense_weight(weight), _one_page(adapter)
    x = None if x is None else rows(x)
    (M, N), K, dtype = dy.shape, _in_features(dy, x, weight), dy.dtype if x is None else x.dtype
    base, dx = _dx_buffers(dy, dtype, weight, K, need_dx, base)
    grads = AdapterGrads(None, None, None, None) if adapter is None else _empty_grads(adapter, dy, K, wanted)
    _cpu.lora_linear_backward(
        _linear_args((M, N, K), x, dtype, weight, None, dropout, over_base=base is not None),
        _adapter_args(adapter),
        dy=dy.data_ptr(),
        dy_stride=dy.stride(0),
        dy_dtype=DTYPES[dy.dtype],
        dx=0 if dx is None else dx.data_ptr(),
        dx_stride=K,
        z=0 if z is None else z.data_ptr(),
        z_stride=0 if z is None else z.stride(0),
        grads=[] if adapter is None else [_addresses(grads)],
    )
    return dx, grads


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    table: AdapterTable,
    ids: Tensor,
    z: Tensor | None,
    *,
    dropout: Dropout | None = None,
    need_dx: bool = True,
    wanted: Sequence[Wanted] | None = None,
    base: Tensor | None = None,
) -> tuple[Tensor | None, list[AdapterGrads | None]]:
    """base: as in `lora_linear_backward`."""
    dy, weight, ids = rows(dy), _dense_weight(weight), _ids(ids)
    x, z = None if x is None else rows(x), None if z is None else rows(z)
    (M, N), K, dtype = dy.shape, _in_features(dy, x, weight), dy.dtype if x is None else x.dtype
    base, dx = _dx_buffers(dy, dtype, weight, K, need_dx, base)
    each = [ALL] * len(table.adapters) if wanted is None else wanted
    grads = [None if a is None else _empty_grads(a, dy, K, w) for a, w in zip(table.adapters, each, strict=True)]
    _cpu.lora_linear_backward(
        _linear_args((M, N, K), x, dtype, weight, None, dropout, over_base=base is not None),
        _table_args(table),
        ids=ids.data_ptr(),
        dy=dy.data_ptr(),
        dy_stride=dy.stride(0),
        dy_dtype=DTYPES[dy.dtype],
        dx=0 if dx is None else dx.data_ptr(),
        dx_stride=K,
        z=0 if z is None else z.data_ptr(),
        z_stride=0 if z is None else z.stride(0),
        grads=[(0, 0, 0, 0) if g is None else _addresses(g) for g in grads],
    )
    return dx, grads


def merge_(weight: Tensor, factors: Factors) -> MergeReceipt:
    return _remerge(weight, None, factors)


def unmerge_(weight: Tensor, receipt: MergeReceipt) -> None:
    with in_rows([weight]) as (W,):
        code, far = code_as_halves(receipt)
        from_side = _merge_side(receipt.factors, code, far, receipt.raw_values)
        _cpu.remerge(_weight(W), from_side, None, threads=torch.get_num_threads())


def remerge_(weight: Tensor, receipt: MergeReceipt, factors: Factors) -> MergeReceipt:
    return _remerge(weight, receipt, factors)


def checksum(weight: Tensor) -> int:
    weight = rows(weight)  # keeps a copy alive during the call
    return _cpu.checksum(_weight(weight), threads=torch.get_num_threads())


def _remerge(weight: Tensor, receipt: MergeReceipt | None, factors: Factors) -> MergeReceipt:
    """From W, or from W' of the receipt's merge, to W' with `factors`: one pass, in place."""
    N, K = weight.shape
    code = weight.new_empty(N, (K + 1) // 2, dtype=torch.uint8)
    old = None if receipt is None else code_as_halves(receipt)  # keeps the tensors alive during the call
    from_side = None if receipt is None or old is None else _merge_side(receipt.factors, *old, receipt.raw_values)
    with in_rows([weight]) as (W,):
        to_side, threads = _merge_side(factors, code), torch.get_num_threads()
        finite, total, far, bits = _cpu.remerge(_weight(W), from_side, to_side, threads=threads)
        if not finite:
            raise NotFiniteError
    return MergeReceipt(factors, code, torch.from_numpy(far), torch.from_numpy(bits).view(weight.dtype), total)


def _weight(weight: Tensor) -> _cpu.MergeWeight:
    N, K = weight.shape
    return _cpu.MergeWeight.of(weight=weight.data_ptr(), stride=weight.stride(0), N=N, K=K, dtype=DTYPES[weight.dtype])


def _merge_side(
    factors: Factors, code: Tensor, far: Tensor | None = None, raw_values: Tensor | None = None
) -> _cpu.MergeSide:
    """Adapters and their code, two weights per byte. It holds addresses: the caller keeps the tensors alive.

    A receipt's tensors are contiguous: made here, or by its `to`. far, raw_values: of the merge that W holds before the
    call.
    """
    A, B, ends, scaling = factors
    return _cpu.MergeSide.of(
        lora_A=A.data_ptr(),
        lora_B=B.data_ptr(),
        ends=ends,
        scaling=scaling,
        dtype=DTYPES[A.dtype],
        halves=code.data_ptr(),
        far=0 if far is None else far.data_ptr(),
        far_count=0 if far is None else len(far),
        raws=0 if raw_values is None else raw_values.data_ptr(),
        raw_count=0 if raw_values is None else len(raw_values),
    )


def _dense_weight(weight: Tensor | None) -> Tensor | None:
    return weight if weight is None or 1 in weight.stride() else weight.contiguous()


def _in_features(dy: Tensor, x: Tensor | None, weight: Tensor | None) -> int:
    """K in a backward, where x may be None; without a weight, K = N."""
    return x.shape[1] if x is not None else dy.shape[1] if weight is None else weight.shape[1]


def _ids(ids: Tensor) -> Tensor:
    if ids.dtype != torch.int32:
        raise ValueError(f"ids: expected int32, got {ids.dtype}")
    return ids.contiguous()


def _one_page(adapter: Adapter | None) -> Adapter | None:
    """The adapter with A and B as one tensor each and contiguous rows of A. Copies only if it is not so already."""
    if adapter is None or (len(adapter.pages_A) == 1 and adapter.pages_A[0].stride()[1] == 1) or not adapter.pages_A:
        return adapter
    A, B = torch.cat(adapter.pages_A), torch.cat(adapter.pages_B, dim=1)
    return Adapter((A,), (B,), adapter.scaling, adapter.activation, adapter.bias_A, adapter.bias_B)


def _linear_args(
    shape: tuple[int, int, int],
    x: Tensor | None,
    x_dtype: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout: Dropout | None,
    *,
    over_base: bool,
) -> _cpu.Linear:
    """shape: M, N, K. x is None in some backwards; x_dtype is then the dtype of dX."""
    M, N, K = shape
    p, seed = (0.0, 0) if dropout is None else (dropout.p, int(dropout.seed) & 0xFFFFFFFFFFFFFFFF)
    if over_base or weight is None:
        return _cpu.Linear.over_base(
            M=M,
            N=N,
            K=K,
            x=0 if x is None else x.data_ptr(),
            x_stride=K if x is None else x.stride(0),
            x_dtype=DTYPES[x_dtype],
            dropout_p=p,
            seed=seed,
            threads=torch.get_num_threads(),
        )
    weight_n, weight_k = weight.stride()
    codes, packing = packed.arguments(weight) if isinstance(weight, QuantizedWeight) else (weight, None)
    return _cpu.Linear.of(
        M=M,
        N=N,
        K=K,
        x=0 if x is None else x.data_ptr(),
        x_stride=K if x is None else x.stride(0),
        x_dtype=DTYPES[x_dtype],
        weight=codes.data_ptr(),
        weight_n=weight_n,
        weight_k=weight_k,
        weight_dtype=DTYPES[weight.dtype if packing is None else torch.float32],
        packing=packing,
        bias=0 if bias is None else bias.data_ptr(),
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        dropout_p=p,
        seed=seed,
        batch_invariant=determinism.is_batch_invariant(),
        threads=torch.get_num_threads(),
    )


def _dx_buffers(
    dy: Tensor, dtype: torch.dtype, weight: Tensor | None, K: int, need_dx: bool, base: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The tensor that dX is accumulated into, if there is one (without a weight, a copy of dY), and dX [M, K]."""
    if not need_dx:
        return None, None
    if weight is None:
        base = dy.clone(memory_format=torch.contiguous_format)
    return base, dy.new_empty(dy.shape[0], K, dtype=dtype) if base is None else base


def _adapter_args(adapter: Adapter | None) -> _cpu.Adapters:
    """The adapter of `_one_page` as kernel arguments: addresses, so the caller keeps it alive."""
    if adapter is None:
        return _NO_ADAPTER
    bias_A, bias_B = adapter.bias_A, adapter.bias_B
    if not adapter.pages_A:  # biases alone
        return _cpu.Adapters.one(
            A=0,
            stride_A=0,
            B=0,
            stride_Bn=0,
            stride_Br=0,
            bias_A=0 if bias_A is None else bias_A.data_ptr(),
            bias_B=0 if bias_B is None else bias_B.data_ptr(),
            rank=0,
            activation=0,
            scaling=0.0,
            dtype=DTYPES[torch.float32 if bias_B is None else bias_B.dtype],
        )
    A, B = adapter.pages_A[0], adapter.pages_B[0]
    stride_Bn, stride_Br = B.stride()
    return _cpu.Adapters.one(
        A=A.data_ptr(),
        stride_A=A.stride(0),
        B=B.data_ptr(),
        stride_Bn=stride_Bn,
        stride_Br=stride_Br,
        bias_A=0 if bias_A is None else bias_A.data_ptr(),
        bias_B=0 if bias_B is None else bias_B.data_ptr(),
        rank=A.shape[0],
        activation=CODES[adapter.activation],
        scaling=adapter.scaling,
        dtype=DTYPES[A.dtype],
    )


def _part(bias: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if bias is None else bias[start:end]


def _packed_rows(table: AdapterTable) -> Tensor:
    """`table.rows`, or for packed outputs rows in which a slot is taken in every slice if it is in one.

    An id has its adapters in some slices and none in others; the kernel, which is called for each, refuses an id
    without an adapter.
    """
    if table.slices == 1:
        return table.rows
    kept: Tensor | None = table.derived.get(_packed_rows)
    if kept is None or table.live is not None:
        kept = table.derived[_packed_rows] = _build_packed_rows(table)
    return kept


def _build_packed_rows(table: AdapterTable) -> Tensor:
    taken = table.rows[:, 3].view(table.slices, table.count)
    anywhere = taken.amax(0).expand_as(taken)
    if torch.equal(taken, anywhere):
        return table.rows
    found = table.rows.clone()
    found[:, 3] = anywhere.reshape(-1)
    return found


def _table_args(table: AdapterTable, slice: int = 0, packed_rows: Tensor | None = None) -> _cpu.Adapters:
    """One slice of a table as kernel arguments. packed_rows: of `_packed_rows`; the caller keeps them alive."""
    pages, rows, scaling, biases, _, dtype = _table_addresses(table)
    rows = rows if packed_rows is None else packed_rows.data_ptr()
    first = slice * table.count
    return _cpu.Adapters.of_table(
        pages=pages,
        rows=rows + first * table.rows.stride(0) * table.rows.element_size(),
        scaling=scaling + first * table.scaling.element_size(),
        biases=biases + first * table.biases.stride(0) * table.biases.element_size(),
        slice_count=1,
        count=table.count,
        z_pages=table.slice_pages[slice + 1] - table.slice_pages[slice],
        dtype=dtype,
    )


def _table_addresses(table: AdapterTable) -> tuple[int, int, int, int, int, int]:
    """Addresses of pages, rows, scaling and biases; the number of adapters in all slices; the dtype's code.

    Kept with the table, whose tensors stay where they are: every layer of every step asks.
    """
    tensors = table.pages, table.rows, table.scaling, table.biases
    found = table.derived[_table_addresses] = *(t.data_ptr() for t in tensors), len(table.adapters), DTYPES[table.dtype]
    return found


def _empty_grads(adapter: Adapter, dy: Tensor, K: int, wanted: Wanted) -> AdapterGrads:
    """Empty tensors for the wanted gradients, in the shapes of the adapter's dense tensors."""
    dtype = adapter.tensors()[0].dtype if adapter.tensors() else dy.dtype
    N, R = dy.shape[1], adapter.rank

    def empty(exists: bool, wants: bool, *shape: int) -> Tensor | None:
        return dy.new_empty(shape, dtype=dtype) if exists and wants else None

    return AdapterGrads(
        empty(bool(adapter.pages_A), wanted.lora_A, R, K),
        empty(bool(adapter.pages_B), wanted.lora_B, N, R),
        empty(adapter.bias_A is not None, wanted.bias_A, R),
        empty(adapter.bias_B is not None, wanted.bias_B, N),
    )


def _addresses(grads: AdapterGrads) -> tuple[int, int, int, int]:
    A, B, bias_A, bias_B = (0 if g is None else g.data_ptr() for g in grads)
    return A, B, bias_A, bias_B


blocking.use_found()
