"""Compiles Triton's merge kernels for GPUs that need not be present: spills, wide accesses, specified roundings."""

from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process that does not interpret", allow_module_level=True)

from peftk.backends import triton as backend
from peftk.launch import merge_layers
from peftk.reference.merge import Factors
from peftk.triton_kernels import config
from peftk.triton_kernels import merge as kernels
from tests.support.tiers import spread
from tests.support.triton_aot import Compiled, compiling

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KERNELS = ("merge_kernel", "unmerge_kernel", "restore_kernel", "checksum_kernel")
TARGETS: list[int | str] = [80, 86, 89, 90, 100, 120, "gfx942"]
MIXES = [(w, a) for w in (BF16, F16, F32) for a in (F32, BF16, F16)]
Shape = tuple[int, int, tuple[int, ...]]  # N, K, the ranks of the adapters


def compile_merge(
    target: int | str, dtype: torch.dtype, adapter_dtype: torch.dtype, *lists: list[Shape]
) -> list[Compiled]:
    """The compiled launches of the four kernels for each list of layers, in the order of KERNELS."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    with compiling(target, kernels, KERNELS) as compiled:
        for shapes in lists:
            weights = [empty(N, K, dtype=dtype) for N, K, _ in shapes]
            codes = [empty(N, K, dtype=torch.int8) for N, K, _ in shapes]
            factors = []
            for N, K, ranks in shapes:
                R, ends = sum(ranks), tuple(sum(ranks[: i + 1]) for i in range(len(ranks)))
                A, B = empty(R, K, dtype=adapter_dtype), empty(N, R, dtype=adapter_dtype)
                factors.append(Factors(A, B, ends, (1.0,) * len(ranks)))
            layers = backend._in_place._layers(weights, codes, factors)
            notes, raw = merge_layers._notes(layers), merge_layers._empty_raw(layers, 4096)
            kernels.merge(layers, notes, raw)
            kernels.unmerge(layers, notes.merged)
            kernels.restore(layers, raw)
            kernels.sum_rows(layers, notes.row_sums)
    return compiled


def check_fits(c: Compiled, target: int | str) -> None:
    assert c.spilled == 0, f"{c.kernel}: {c.spilled} bytes of registers spilled, {c.registers} registers"
    assert c.shared <= config.shared_memory("hip" if isinstance(target, str) else target)


def check_roundings(c: Compiled) -> None:
    """In PTX .rn on a sum or product forbids contraction, and .ftz would flush.

    There are two code paths through a tile. In each a thread has 8 weights, and for each weight three fma (two ranks at
    once, one left over), a product with the scaling, and the sums d, W + d and W' - d. Unmerge has no W + d.
    """
    operations = re.findall(r"\b(fma|mul|add|sub|mad)\.((?:\w+\.)*)f32(x2)?\b", c.assembly)
    assert all("ftz" not in kind for _, kind, _ in operations)
    assert all("rn" in kind for _, kind, _ in operations)
    assert ".ftz" not in c.assembly
    count = {name: sum(1 + (x2 == "x2") for op, _, x2 in operations if op == name) for name, *_ in operations}
    sums = {"merge_kernel": 3, "unmerge_kernel": 2}[c.kernel]
    assert count["fma"] == 2 * 8 * 3
    assert count["mul"] == 2 * 8
    assert count["add"] + count.get("sub", 0) == 2 * 8 * sums
    assert "mad" not in count


def check_wide_accesses(c: Compiled, dtype: torch.dtype) -> None:
    """W is accessed in 16 bytes, its code in as many bytes as those have weights. No floating-point atomics."""
    per_thread = 8 * dtype.itemsize // 16
    assert len(re.findall(r"ld\.global\.v4\.b32", c.assembly)) == per_thread
    assert len(re.findall(r"st\.global\.v4\.b32", c.assembly)) == per_thread
    code = "v2.b32" if dtype.itemsize == 2 else "b32"
    assert len(re.findall(rf"{'st' if c.kernel == 'merge_kernel' else 'ld'}\.global\.{code}", c.assembly)) >= per_thread
    assert not re.search(r"(atom|red)\.[\w.]*\.(f32|f16|bf16|f64)", c.assembly)


EVERY_MIX = [(target, *mix) for target in TARGETS for mix in MIXES]


@pytest.mark.parametrize(("target", "dtype", "adapter_dtype"), spread(EVERY_MIX, default=2, full=12), ids=str)
def test_compiles(target: int | str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    compiled = compile_merge(target, dtype, adapter_dtype, [(4096, 4096, (16,))])
    assert [c.kernel for c in compiled] == list(KERNELS)
    for c in compiled:
        check_fits(c, target)
    for c in compiled[:2]:
        if isinstance(target, str):
            # no instruction flushes; the mode that the others use keeps denormals
            assert not re.search(r"v_(mad|mac)_f32", c.assembly)
            assert re.search(r"\.amdhsa_float_denorm_mode_32 3", c.assembly)
            assert "global_load_dwordx4" in c.assembly
            assert "global_store_dwordx4" in c.assembly
        else:
            check_roundings(c)
            check_wide_accesses(c, dtype)


def test_ranks_and_numbers_of_layers_are_not_specialized() -> None:
    """One launch per list, and a single variant for all lists."""
    lists: list[list[Shape]] = [
        [(1, 1, (1,))],
        [(4096, 4096, (16,))],
        [(64, 4095, (512, 3)), (4096, 64, (8,)), (100, 100, (1, 1, 1))],
    ]
    compiled = compile_merge(90, BF16, F32, *lists)
    assert [c.kernel for c in compiled] == list(KERNELS) * len(lists)
    assert len({id(c.assembly) for c in compiled}) == len(KERNELS)
