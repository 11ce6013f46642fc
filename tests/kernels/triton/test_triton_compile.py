"""Compiles every shipped Triton configuration for GPUs that need not be present, and checks the result."""

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process that does not interpret", allow_module_level=True)

import triton

from peftk.triton_kernels import config, lora_wgrad, merge_tile, segments
from peftk.triton_kernels import lora_linear as kernels
from tests.support.tiers import spread
from tests.support.triton_aot import Compiled, compiling
from tests.support.triton_calls import (
    BF16,
    F16,
    F32,
    FORMS,
    MIXES,
    MORE_TARGETS,
    OVER_BASE,
    TARGETS,
    TENSOR_CORES,
    Mix,
    check_fits,
    compile_call,
    compile_launches,
)

EVERY_MIX: list[Mix] = [
    *((x, w, a) for x in (F32, BF16) for w in (F32, BF16) for a in (F32, BF16)),
    *((x, w, a) for x in (F32, F16) for w in (F32, F16) for a in (F32, F16) if F16 in (x, w, a)),
]


def is_supported(target: int | str, mix: Mix) -> bool:
    """Whether the backend supports these dtypes, as in its `cannot_run`."""
    return isinstance(target, int) or (mix[0] == mix[1] and mix[2] in (mix[0], F32))


def check_hardware_use(assembly: str, target: int | str, M: int, mix: Mix) -> None:
    """Copies of 16 bytes or more, and tensor cores unless a factor is fp32.

    wgmma and tcgen05 need 64 rows or more, so expand uses them above 16 rows. Shrink's tiles have 16 or 32 rows: its
    output is only 16 columns wide, and it needs many programs that read x. Shrink, and expand at M = 16, use mma.sync.
    """
    if isinstance(target, str):
        assert "v_mfma" in assembly
        assert "dwordx4" in assembly
        return
    if F32 not in mix:
        assert "mma.sync" in assembly, "no tensor cores in shrink"
        assert M <= 16 or TENSOR_CORES[target] in assembly, "no tensor cores in expand"
    copies = assembly.count("cp.async.cg.shared.global")
    assert copies >= 8, f"{copies} copies of 16 bytes"


def check_protocol(c: Compiled) -> None:
    """The PTX has the atomics on which `triton_kernels.tickets` relies."""
    assert re.search(r"atom\S*\.relaxed\S*\.add", c.assembly)
    assert re.search(r"(atom|red)\S*\.release\S*\.add", c.assembly)
    assert re.search(r"(atom|ld)\S*\.acquire\b", c.assembly)
    assert not re.search(r"(atom|red)\S*\.f(16|32|64)|(atom|red)\S*bf16", c.assembly), "floating-point atomics"
    assert "ld.global.nc" not in c.assembly


@pytest.mark.parametrize(
    ("target", "mix", "M", "many"),
    spread(itertools.product(TARGETS, MIXES, (16, 4096), (False, True)), default=5),
    ids=str,
)
def test_compiles(target: int | str, mix: Mix, M: int, many: bool) -> None:
    launches = compile_launches(target, M, mix, many=many)
    for compiled in launches:
        check_fits(compiled, target)
    if len(launches) == 1:
        check_protocol(launches[0])
    assembly = "".join(compiled.assembly for compiled in launches)
    check_hardware_use(assembly, target, M, mix)
    tiles_by_the_copy_engine = isinstance(target, int) and target >= 90 and M > 64 and mix[0] != F32
    assert ("cp.async.bulk.tensor" in assembly) == tiles_by_the_copy_engine


EVERY_FORM = [
    (target, mix, M, form)
    for form, M, target, mix in itertools.product(FORMS, (16, 64, 128, 4096), [*TARGETS, *MORE_TARGETS], EVERY_MIX)
    if is_supported(target, mix)
]


@pytest.mark.parametrize(("target", "mix", "M", "form"), spread(EVERY_FORM, default=0, full=12), ids=str)
def test_compiles_every_form(target: int | str, mix: Mix, M: int, form: str) -> None:
    check_fits(compile_call(target, M, mix, **FORMS[form]), target)


EVERY_FORM_OVER_BASE = [
    (target, mix, M, form)
    for form, M, target, mix in itertools.product(OVER_BASE, (16, 4096), [*TARGETS, *MORE_TARGETS], EVERY_MIX)
    if is_supported(target, mix) and mix[0] == mix[1]
]


@pytest.mark.parametrize(("target", "mix", "M", "form"), spread(EVERY_FORM_OVER_BASE, default=3, full=12), ids=str)
def test_compiles_over_a_product(target: int | str, mix: Mix, M: int, form: str) -> None:
    compiled = compile_call(target, M, mix, **OVER_BASE[form])
    check_fits(compiled, target)


ODD_FORMS = itertools.product([90, 80, 100, 120, "gfx942"], (BF16, F32, F16), (4095, 4096))


@pytest.mark.parametrize(("target", "dtype", "K"), spread(ODD_FORMS, default=0, full=6), ids=str)
def test_compiles_with_dropout_unaligned_rows_and_odd_widths(target: int | str, dtype: torch.dtype, K: int) -> None:
    for many in (False, True):
        mix = (dtype, dtype, dtype)
        check_fits(compile_call(target, 4096, mix, many=many, dropout_p=0.1, aligned=K % 8 == 0, K=K, N=K), target)


WIDE_RANKS = itertools.product([*TARGETS, *MORE_TARGETS], (BF16, F16), (16, 64, 256, 4096), (32, 64), (False, True))


@pytest.mark.parametrize(("target", "dtype", "M", "ranks", "backward"), spread(WIDE_RANKS, default=2, full=10), ids=str)
def test_compiles_for_more_ranks_than_a_page(
    target: int | str, dtype: torch.dtype, M: int, ranks: int, backward: bool
) -> None:
    """One adapter of 32 ranks, or of 64 and more: shrink tiles as wide."""
    with compiling(target, kernels, ("lora_linear_kernel",)) as compiled:
        x = torch.empty(M, 4096, dtype=dtype, device="meta")
        weight = torch.empty(4096, 4096, dtype=dtype, device="meta")
        one = kernels.AdapterArgs(1 << 40, 4096, 1 << 40, ranks, 1, 0, 0, ranks, 0, 1.0)
        adapters = kernels.Adapters(one, dtype, ranks, "k16", "r16")
        if backward:
            kernels.backward(x, weight, 4096, adapters, None, torch.empty(M, ranks, dtype=F32, device="meta"))
        else:
            kernels.forward(x, weight, None, adapters, None)
    for each in compiled:
        check_fits(each, target)


def test_ranks_are_not_specialized() -> None:
    """One variant runs ranks 1 to 16, and one all above 32, in any place and strides, for one row and many."""
    with compiling(90, kernels, ("lora_linear_kernel",)) as compiled:
        for rank, width, address, stride in (
            (1, 16, 1 << 40, 1), (16, 16, 4096, 16), (512, 512, (1 << 40) + 2, 37), (70, 80, 4096, 16),
        ):  # fmt: skip
            one = kernels.AdapterArgs(address, 4096, address, stride, 1, 0, address, rank, 0, 1.0)
            x = torch.empty(1 if rank == 1 else 16, 4096, dtype=BF16, device="meta")
            weight = torch.empty(4096, 4096, dtype=BF16, device="meta")
            kernels.forward(x, weight, None, kernels.Adapters(one, BF16, width, "k16", "any"), None)
    narrow, same, wide, same_again = compiled
    assert narrow.assembly is same.assembly
    assert wide.assembly is same_again.assembly


def test_scalars_have_the_width_that_they_need() -> None:
    """s and 1/(1 − p) are fp32, users' addresses and strides int64. (The interpreter ignores types of arguments.)"""
    modules = (kernels, lora_wgrad, merge_tile, segments)
    found = {
        (name, parameter.name): parameter.annotation_type
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
        for parameter in kernel.params
        if parameter.annotation_type
    }
    assert {name for _, name in found} >= {"scaling", "one_scaling", "keep_scale", "one_A", "one_stride_Br", "M"}
    for (kernel, name), width in found.items():
        fp32, int64 = "scal" in name, re.match(r"one_(A|B|stride|bias)|stride$|count$", name)
        assert width == ("fp32" if fp32 else "i64" if int64 else "i32"), f"{kernel}: {name}"


@pytest.mark.parametrize(
    ("version", "most"), [("3.6.0", 255), ("3.8.2", 255), ("3.9.0", 252), ("3.10.1+git1a2b", 252), ("4.0", 252)]
)
def test_the_limit_of_registers_follows_tritons_version(
    monkeypatch: pytest.MonkeyPatch, version: str, most: int
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    config._most_registers.cache_clear()
    try:
        assert config.options(90)["maxnreg"] == most
    finally:
        config._most_registers.cache_clear()
