"""Runs the CPU kernels on tensors that end right before a protected page, or begin right behind one.

    python -m tests.support.guard_pages LEVEL…

A read or write outside a tensor, outputs included, kills the process; the last line printed is the case. Results must
have the same bits as on ordinary tensors. `tests/kernels/cpu/test_guard_pages.py` starts it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import mmap
import random
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from peftk import _cpu
from peftk.adapters.adapter import Adapter
from peftk.adapters.dropout import Dropout
from peftk.backends import cpu
from peftk.backends.packed import FORMATS
from peftk.ops import dispatch
from peftk.quantized.weight import QuantizedWeight
from tests.support.cases import DTYPES, Case, normal, random_case
from tests.support.merge_cases import MergeCase, copies, merge_case
from tests.support.quantized_cases import quantized_case

LIBC = ctypes.CDLL(None, use_errno=True)
PAGE, PROT_NONE = mmap.PAGESIZE, 0


def guarded_copy(value: Any, behind: bool) -> Any:
    """A copy of a tensor with the same strides, or of a tuple or dataclass with tensors.

    behind: a protected page follows the last element; else it precedes the first one.
    """
    if isinstance(value, QuantizedWeight):
        return value.map(lambda part: guarded_copy(part, behind))
    if isinstance(value, Tensor) and value.numel():
        return _guarded_tensor(value, behind)
    if isinstance(value, tuple):
        parts = [guarded_copy(part, behind) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: guarded_copy(getattr(value, name), behind) for name in fields})
    return value


def _guarded_tensor(tensor: Tensor, behind: bool) -> Tensor:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    pages = -(-extent * tensor.itemsize // PAGE)
    block = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block)) + (pages * PAGE if behind else 0)
    if LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = pages * PAGE - extent * tensor.itemsize if behind else PAGE
    whole = torch.frombuffer(block, dtype=tensor.dtype, count=extent, offset=offset)
    return whole.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def guarded_outputs(behind: bool) -> mock._patch_multiple:
    """Makes new_empty and new_zeros, which allocate the kernels' outputs, return guarded tensors."""

    def guarding(make: Any) -> Any:
        return lambda *args, **kwargs: guarded_copy(make(*args, **kwargs), behind)

    return mock.patch.multiple(Tensor, **{name: guarding(getattr(Tensor, name)) for name in ("new_empty", "new_zeros")})


def run_linear(case: Case, dropout_p: float, behind: bool | None = None) -> list[Tensor]:
    """y and z; y added to an existing base, and by the direct call; dx and all gradients."""
    assert case.weight is not None
    place = (lambda value: value) if behind is None else (lambda value: guarded_copy(value, behind))
    case, dropout = place(case), Dropout(dropout_p, torch.tensor([7])) if dropout_p else None
    x, weight, bias, rest = case.x, case.weight, case.bias, {"dropout": dropout}
    dy = place(normal(x.shape[0], weight.shape[0], dtype=x.dtype, seed=1))
    if case.ids is None:
        (adapter,) = case.adapters
        y, z = cpu.lora_linear(x, weight, bias, adapter, save_z=True, **rest)
        over, _ = cpu.lora_linear(x, weight, None, adapter, base=place(y.clone()), **rest)
        factors = (None, None) if adapter is None else (adapter.lora_A, adapter.lora_B)
        short = dispatch.direct_lora_linear(x, weight, bias, *factors, 0.5)
        dx, *grads = cpu.lora_linear_backward(dy, x, weight, adapter, z, **rest)
    else:
        table = place(case.table())
        y, z = cpu.multi_lora_linear(x, weight, bias, table, case.ids, save_z=True, **rest)
        over, _ = cpu.multi_lora_linear(x, weight, None, table, case.ids, base=place(y.clone()), **rest)
        short = dispatch.direct_multi_lora_linear(x, weight, bias, table, case.ids)
        dx, grads = cpu.multi_lora_linear_backward(dy, x, weight, table, case.ids, z, **rest)
    return [t for t in (y, z, over, short, dx, *itertools.chain(*filter(None, grads))) if t is not None]


def run_merge(case: MergeCase, behind: bool | None = None) -> list[Tensor]:
    """W', its receipt's tensors, W' with another scaling, W and its checksum."""
    place = (lambda value: value) if behind is None else (lambda value: guarded_copy(value, behind))
    weight = place(*copies([case.weight]))
    receipt = place(cpu.merge_(weight, place(case.factors)))
    results = [weight.clone(), receipt.code, receipt.far, receipt.raw_values]
    other = place(cpu.remerge_(weight, receipt, place(case.factors._replace(scaling=(-0.5,)))))
    results.append(weight.clone())
    cpu.unmerge_(weight, other)
    return [*results, weight, torch.tensor([cpu.checksum(weight) % 2**63])]


def iter_linear_cases() -> Iterator[Case]:
    """Random cases, and every remainder of K and N modulo the vector width, in all dtypes, with few rows and many."""
    for seed in range(60):
        yield random_case(50_000 + seed, max_rows=70, max_width=90)
    for seed, format in enumerate(FORMATS * 3):
        yield quantized_case(format, seed)[0]
    rng = random.Random(0)
    for number, (width, M) in enumerate(itertools.product(range(1, 36), (1, 5, 19))):
        dtypes = [DTYPES[number // 3**i % 3] for i in range(3)]
        K, N, R = rng.sample([width, rng.randint(1, 35), rng.randint(1, 35)], 3)
        A, B = normal(R, K, dtype=dtypes[2], seed=1), normal(N, R, dtype=dtypes[2], seed=2)
        biases = normal(R, dtype=dtypes[2], seed=3), normal(N, dtype=dtypes[2], seed=4)
        adapter = Adapter((A,), (B,), 0.5, "relu" if number % 2 else "identity", *biases)
        x, weight = normal(M, K, dtype=dtypes[0], seed=5), normal(N, K, dtype=dtypes[1], seed=6)
        yield Case(x, weight, normal(N, dtype=dtypes[number % 3], seed=7), (adapter,), None)


def iter_merge_cases() -> Iterator[MergeCase]:
    for number, (K, padding) in enumerate(itertools.product((1, 7, 15, 16, 17, 33, 129), (0, 3))):
        for dtype, adapter_dtype in itertools.product(DTYPES, DTYPES):
            N, R = 1 + number * 7 % 30, 1 + number * 5 % 18
            yield merge_case(number, N, K, R, dtype, adapter_dtype, size=0.5, padding=padding)


def same_bits(results: list[Tensor], elsewhere: list[Tensor]) -> bool:
    def as_bytes(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(torch.uint8)

    return all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(results, elsewhere, strict=True))


def main(*levels: str) -> None:
    calls = [(run_linear, case, 0.3 * (number % 2)) for number, case in enumerate(iter_linear_cases())]
    calls += [(run_merge, case) for case in iter_merge_cases()]
    for level, (call, *arguments) in itertools.product(levels, calls):
        _cpu.use_simd_level(level)
        elsewhere = call(*arguments)
        for behind in (True, False):
            print(f"{level}, a protected page {'behind' if behind else 'before'}: {arguments[0]}", flush=True)
            with guarded_outputs(behind):
                assert same_bits(call(*arguments, behind), elsewhere), "expected the same bits as on ordinary tensors"


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
