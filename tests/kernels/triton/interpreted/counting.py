"""Tests `tests.support.counting` on kernels small enough to count by hand."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.counted.work import Traffic
from tests.support.counting import counting


@triton.jit
def _copy(x, y, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


def test_masked_lanes_do_not_count() -> None:
    x, y = torch.randn(21), torch.empty(21)
    with counting() as launches:
        _copy[(3,)](x, y, 21, SIZE=8)
        _copy[(2,)](x, y, 21, SIZE=8)
    assert [launch.kernel for launch in launches] == ["_copy", "_copy"]
    assert launches[0].tensors == {"x": Traffic(84, 0, 84, 0), "y": Traffic(0, 84, 0, 84)}
    assert launches[1].tensors == {"x": Traffic(64, 0, 64, 0), "y": Traffic(0, 64, 0, 64)}


@triton.jit
def _twice(x, y):
    at = tl.arange(0, 4)
    tl.store(y + at, tl.load(x + at) + tl.load(x + at))
    tl.store(y + 8 + at, tl.load(y + at) + tl.load(y + 4 + at))
    tl.debug_barrier()


def test_what_a_launch_wrote_itself_is_no_distinct_read() -> None:
    x, y = torch.ones(4, dtype=torch.bfloat16), torch.ones(12)
    with counting() as launches:
        _twice[(1,)](x, y)
    assert launches[0].tensors == {"x": Traffic(16, 0, 8, 0), "y": Traffic(32, 32, 16, 32)}
    assert launches[0].requested == 80
    assert launches[0].distinct == 56


@triton.jit
def _through_a_table(table, y):
    tensor = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    at = tl.arange(0, 4)
    tl.store(y + tl.program_id(0) * 4 + at, tl.load(tensor + at))


def test_pointers_from_memory_count_for_the_tensor_they_point_into() -> None:
    first, second, y = torch.randn(4), torch.randn(4), torch.empty(8)
    table = torch.tensor([first.data_ptr(), second.data_ptr()])
    with counting(adapters=[first, second]) as launches:
        _through_a_table[(2,)](table, y)
    assert launches[0].tensors["adapters"] == Traffic(32, 0, 32, 0)
    assert launches[0].tensors["table"] == Traffic(16, 0, 16, 0)
    assert torch.equal(y, torch.cat([first, second]))
    with pytest.raises(InterpreterError, match="load outside every tensor"), counting():
        _through_a_table[(2,)](table, y)


@triton.jit
def _tiles(x, y, M, K, BLOCK: tl.constexpr):
    device = tl.make_tensor_descriptor(y, shape=[M, K], strides=[K, 1], block_shape=[BLOCK, BLOCK])
    for k in range(0, K, BLOCK):
        device.store([0, k], x.load([0, k]))


def test_tensor_descriptors() -> None:
    """Made on the host and on the device. Elements outside the tensor are not loaded."""
    x, y = torch.randn(12, 32), torch.empty(12, 32)
    with counting() as launches:
        _tiles[(1,)](TensorDescriptor.from_tensor(x, [16, 16]), y, 12, 32, BLOCK=16)
    assert torch.equal(x, y)
    assert launches[0].tensors == {"x": Traffic(1536, 0, 1536, 0), "y": Traffic(0, 1536, 0, 1536)}


@triton.jit
def _atomics(counters, x, y):
    tl.atomic_add(counters + tl.arange(0, 4), 1, mask=tl.arange(0, 4) < 3)
    tl.atomic_cas(counters + 3, 0, 5)
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    square = tl.load(x + at)
    tl.store(y + at, tl.dot(square, square, tl.dot(square, square, input_precision="ieee"), input_precision="ieee"))


def test_atomics_and_products() -> None:
    counters, x, y = torch.zeros(4, dtype=torch.int32), torch.randn(16, 16), torch.empty(16, 16)
    with counting() as launches:
        _atomics[(2,)](counters, x, y)
    assert launches[0].atomics == {"counters": 8}
    assert "counters" not in launches[0].tensors
    assert launches[0].flops == 2 * 2 * 2 * 16**3
    assert counters.tolist() == [2, 2, 2, 5]
