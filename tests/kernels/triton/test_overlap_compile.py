"""Compiles the two launches that may run at the same time (programmatic dependent launch), for GPUs that support it."""

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process that does not interpret", allow_module_level=True)

from peftk.triton_kernels import config
from tests.support.tiers import spread
from tests.support.triton_calls import BF16, F16, F32, FORMS, Mix, check_fits, compile_launches

MIXES: list[Mix] = [(BF16, BF16, BF16), (BF16, BF16, F32), (F16, F16, F16), (F16, F16, F32)]
FORM_NAMES = [form for form, fields in FORMS.items() if not fields["many"]]
CASES = itertools.product((90, 100, 103, 120), MIXES, (256, 4096), FORM_NAMES, (16, 64))


def overlapped(target: int, mix: Mix, M: int, form: str, rank: int) -> list[config.Plan]:
    fields = FORMS[form]
    call = config.CallShape(
        M=M,
        N=4096,
        K=4096,
        many=False,
        packed=False,
        backward=fields.get("backward", False),
        wide=True,
        x=mix[0],
        weight=mix[1],
        adapters=mix[2],
        own_sums="dropout" in form,
        z_pages=rank // 16,
    )
    return [plan for plan in config.shipped_plans(call.shape_class(), target) if plan.overlap]


@pytest.mark.parametrize(("target", "mix", "M", "form", "rank"), spread(CASES, default=1, full=22), ids=str)
def test_two_launches_that_overlap(target: int, mix: Mix, M: int, form: str, rank: int) -> None:
    """No spills; the shrink lets the other launch begin, which waits before it reads z, and only once."""
    plans = overlapped(target, mix, M, form, rank)
    assert plans or (mix == (F16, F16, F32) and target != 90)
    for plan in plans:
        shrink, expand = compile_launches(target, M, mix, rank=rank, plan=plan, **FORMS[form])
        for compiled in (shrink, expand):
            check_fits(compiled, target)
        assert shrink.registers <= 128
        assert shrink.assembly.count("griddepcontrol.launch_dependents") == 1
        assert "griddepcontrol.wait" not in shrink.assembly
        assert expand.assembly.count("griddepcontrol.wait") == 1
        assert "griddepcontrol.launch_dependents" not in expand.assembly
        assert ("cp.async.bulk.tensor" in expand.assembly) == plan.descriptors
        assert "cp.async.bulk.tensor" not in shrink.assembly
        tickets = re.search(r"atom\S*\.relaxed\S*\.add", shrink.assembly + expand.assembly)
        assert tickets is None, "numbered by block"


def test_one_launch_has_no_such_instructions() -> None:
    call = config.CallShape(128, 4096, 4096, False, False, False, True, BF16, BF16, BF16, False, 1)
    plan = config.lora_linear(call, 90)
    assert plan.once
    (only,) = compile_launches(90, 128, MIXES[0], rank=16, plan=plan, many=False)
    assert "griddepcontrol" not in only.assembly


def test_only_the_second_of_two_that_overlap_may_begin_early() -> None:
    early = [
        (part, overlap)
        for part in ("both", "shrink", "expand")
        for overlap in (False, True)
        if config.launch_options(90, part, overlap).get("launch_pdl")
    ]
    assert early == [("expand", True)]


@pytest.mark.parametrize("target", [80, 86, 89, "hip", "interpreter"])
def test_older_gpus_do_not_overlap(target: int | str) -> None:
    for M in (16, 256, 4096):
        call = config.CallShape(M, 4096, 4096, False, False, False, True, BF16, BF16, BF16, False, 4)
        assert not any(plan.overlap for plan in config.candidates(call.shape_class(), target))


def test_overlapping_is_chosen_where_the_shrink_would_keep_the_product_waiting() -> None:
    """Modelled: fp32 factors, or many ranks, of many rows."""

    def plan(M: int, rank: int, factors: torch.dtype) -> config.Plan:
        return config.lora_linear(
            config.CallShape(M, 4096, 4096, False, False, False, True, BF16, BF16, factors, False, rank // 16), 90
        )

    assert plan(4096, 64, F32).overlap
    assert plan(4096, 64, F32).SHRINK_R == 64
    assert plan(4096, 64, BF16).overlap
    assert plan(4096, 16, BF16).once
    assert plan(16, 64, F32).once
