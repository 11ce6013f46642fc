"""Compiles every shipped tile of `lora_wgrad` for GPUs that need not be present, and checks the result."""

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process that does not interpret", allow_module_level=True)

from tests.support.tiers import spread
from tests.support.triton_aot import Compiled
from tests.support.triton_calls import BF16, F16, F32, MORE_TARGETS, TARGETS, TENSOR_CORES, check_fits, compile_wgrad


def check_hardware_use(c: Compiled, target: int | str, dtype: torch.dtype, rank: int) -> None:
    """Tensor cores for 16-bit x and dY (the newer ones with 64 ranks), and copies of 16 bytes for all dtypes."""
    if isinstance(target, str):
        assert "v_mfma" in c.assembly
        assert "dwordx4" in c.assembly
        return
    if dtype != F32:
        tall = rank > 16 and not (target == 100 and dtype == F16)
        assert (TENSOR_CORES[target] if tall else "mma.sync") in c.assembly, "no tensor cores"
    copies = c.assembly.count("cp.async.cg.shared.global")
    assert copies >= 4, f"{copies} copies of 16 bytes"  # with steps of 16 rows, a thread has a single copy


def check_atomics(c: Compiled, target: int | str) -> None:
    """One atomic, an integer addition with acquire and release. No sum depends on the order of programs."""
    if isinstance(target, str):
        atomics = re.findall(r"\b(?:global|flat|buffer)_atomic\w+", c.assembly)
        assert atomics == ["global_atomic_add"], atomics
        return
    atomics = re.findall(r"\b(?:atom|red)\.\S+", c.assembly)
    assert atomics == ["atom.global.gpu.acq_rel.add.u32"], atomics
    barrier, atomic = c.assembly.rfind("bar.sync", 0, c.assembly.find(atomics[0])), c.assembly.find(atomics[0])
    assert c.assembly.rfind("st.global", 0, atomic) < barrier, "the atomic doesn't wait for every thread's stores"


EVERY_FORM = list(itertools.product([*TARGETS, *MORE_TARGETS], [BF16, F16, F32], (64, 16), (False, True)))


@pytest.mark.parametrize(("target", "dtype", "rank", "many"), spread(EVERY_FORM, default=4, full=19), ids=str)
def test_compiles(target: int | str, dtype: torch.dtype, rank: int, many: bool) -> None:
    c = compile_wgrad(target, dtype, dtype, rank, many=many)
    check_fits(c, target)
    check_hardware_use(c, target, dtype, rank)
    check_atomics(c, target)


MIXED = itertools.product(
    [*TARGETS, *MORE_TARGETS], [(BF16, F32), (F16, F32), (F32, BF16), (F32, F16)], (16, 64), (False, True)
)


@pytest.mark.parametrize(("target", "mix", "rank", "many"), spread(MIXED, default=0, full=8), ids=str)
def test_compiles_mixed_dtypes(target: int | str, mix: tuple[torch.dtype, torch.dtype], rank: int, many: bool) -> None:
    check_fits(compile_wgrad(target, *mix, rank, many=many), target)


ODD_FORMS = itertools.product([90, 80, 100, 120, *MORE_TARGETS], (BF16, F32, F16), (4095, 4096), (64, 16))


@pytest.mark.parametrize(("target", "dtype", "K", "rank"), spread(ODD_FORMS, default=0, full=6), ids=str)
def test_compiles_with_dropout_and_odd_widths(target: int | str, dtype: torch.dtype, K: int, rank: int) -> None:
    for many in (False, True):
        c = compile_wgrad(target, dtype, dtype, rank, many=many, dropout_p=0.1, K=K, N=K)
        check_fits(c, target)
        check_atomics(c, target)


def test_ranks_are_not_specialized() -> None:
    """A single variant is used for every rank of a class, and every number of rows, adapters and ranges."""
    for ranks in ((1, 7, 16), (17, 64, 512)):
        several = [
            compile_wgrad(90, BF16, BF16, rank, many=True, M=M, adapters=n)
            for rank, M, n in zip(ranks, (16, 1, 4096), (8, 1, 64), strict=True)
        ]
        assert len({id(c.assembly) for c in several}) == 1
