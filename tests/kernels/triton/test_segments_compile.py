"""Compiles the segments kernels for GPUs that need not be present."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process that does not interpret", allow_module_level=True)

from peftk.triton_kernels import config
from peftk.triton_kernels import segments as kernels
from tests.support.tiers import spread
from tests.support.triton_aot import Compiled, compiling

TARGETS = [90, 80, 100, 120, 86, 89, "gfx942"]
KERNELS = ("segments_kernel", "sort_kernel", "scan_kernel", "scatter_kernel")
LARGE = list(KERNELS[1:])
INTEGERS = (torch.int32, torch.int64)


def compile_segments(target: int | str, M: int, adapters: int, dtype: torch.dtype, stride: int = 1) -> list[Compiled]:
    ids = torch.empty(M * stride + 1, dtype=dtype, device="meta")[1::stride]
    with compiling(target, kernels, KERNELS) as compiled:
        kernels.segments(ids, adapters)
    return compiled


@pytest.mark.parametrize(("target", "dtype"), spread(itertools.product(TARGETS, INTEGERS), default=1, full=7), ids=str)
def test_compiles(target: int | str, dtype: torch.dtype) -> None:
    """One launch up to 1,024 rows, else three. No spills, no atomics."""
    for M, launches in (
        (64, ["segments_kernel"]),
        (256, ["segments_kernel"]),
        (1024, ["segments_kernel"]),
        (9000, LARGE),
    ):
        compiled = compile_segments(target, M, 64, dtype)
        assert [c.kernel for c in compiled] == launches
        for c in compiled:
            assert c.spilled == 0, f"{c.kernel}: {c.spilled} bytes of registers spilled, {c.registers} registers"
            assert c.registers <= 128, f"{c.kernel}: {c.registers} registers"
            assert c.shared <= config.shared_memory("hip" if isinstance(target, str) else target)
            assert "atom" not in c.assembly
            assert not any(name in c.assembly for name in ("red.global", "red.relaxed", "global_atomic"))


@pytest.mark.parametrize("dtype", spread(INTEGERS, default=1), ids=str)
def test_rows_and_adapters_are_not_specialized(dtype: torch.dtype) -> None:
    """Three variants of the one-launch kernel and one of each other, whatever M, adapters, stride and address."""
    variants = set()
    for M, adapters, stride in (
        (1, 1, 1),
        (16, 0, 16),
        (64, 16, 3),
        (100, 1000, 1),
        (256, 1, 2),
        (257, 4, 1),
        (1024, 5000, 16),
    ):
        variants |= {c.assembly for c in compile_segments(90, M, adapters, dtype, stride)}
    assert len(variants) == 3
    variants = set()
    for M, adapters, stride in ((1025, 1, 1), (16384, 0, 16), (100_000, 5000, 3)):
        variants |= {c.assembly for c in compile_segments(90, M, adapters, dtype, stride)}
    assert len(variants) == 3
