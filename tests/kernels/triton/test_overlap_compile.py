"""Compiles the two launches that may run at the same time (programmatic dependent launch), for GPUs that support it."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process that does not interpret", allow_module_level=True)

from peftk.tools.selftest.plans import PLANS, override_plan, ways
from peftk.triton_kernels import config, tuned
from tests.support.tiers import FULL, spread
from tests.support.triton_calls import BF16, F16, F32, FORMS, Mix, check_fits, compile_launches

MIXES: list[Mix] = [(BF16, BF16, BF16), (BF16, BF16, F32), (F16, F16, F16), (F16, F16, F32)]
CASES = itertools.product((90, 100, 103, 120), MIXES, (256, 4096), FORMS, (16, 64))


def has_room(target: int, mix: Mix, form: str) -> bool:
    """Whether a small block has registers for the shrink: not for some products with fp32 factors."""
    tight = FORMS[form]["many"] + (mix[0] == F16)
    return mix[2] != F32 or tight == 0 or (tight == 1 and target == 90 and not FORMS[form].get("backward", False))


def overlapped(target: int, mix: Mix, M: int, form: str, rank: int) -> list[config.Plan]:
    fields = FORMS[form]
    call = config.CallShape(
        M=M,
        N=4096,
        K=4096,
        many=fields["many"],
        packed=fields.get("packed", False),
        backward=fields.get("backward", False),
        wide=True,
        x=mix[0],
        weight=mix[1],
        adapters=mix[2],
        own_sums="dropout" in form,
        z_pages=rank // 16 * (3 if fields.get("packed") else 1),
    )
    return [plan for plan in config.shipped_plans(call.shape_class(), target) if plan.overlap]


@pytest.mark.parametrize(("target", "mix", "M", "form", "rank"), spread(CASES, default=1, full=22), ids=str)
def test_two_launches_that_overlap(target: int, mix: Mix, M: int, form: str, rank: int) -> None:
    """No spills; the shrink lets the other launch begin, which waits before it reads z, and only once."""
    plans = overlapped(target, mix, M, form, rank)
    assert bool(plans) == has_room(target, mix, form)
    for plan in plans:
        shrink, expand = compile_launches(target, M, mix, rank=rank, plan=plan, **FORMS[form])
        for compiled in (shrink, expand):
            check_fits(compiled, target)
        assert shrink.registers <= 128
        assert shrink.assembly.count("griddepcontrol.launch_dependents") == 1
        assert "griddepcontrol.wait" not in shrink.assembly
        assert expand.assembly.count("griddepcontrol.wait") == 1
        assert "griddepcontrol.launch_dependents" not in expand.assembly
        assert ("cp.async.bulk.tensor" in expand.assembly) == (plan.descriptors and "identity" not in form)
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


@pytest.mark.parametrize("rank", [16, 64])
def test_the_selftest_launches_what_ships(rank: int) -> None:
    """Where the chosen plan is of the other kind, it takes the best shipped one of its own kind."""
    for M in (16, 64, 128, 512, 4096):
        for factors in (BF16, F32):
            call = config.CallShape(M, 4096, 4096, False, False, False, True, BF16, BF16, factors, False, rank // 16)
            shipped = [
                config.with_splits(plan, call, 90)
                for plan in config.shipped_plans(call.shape_class(), 90)
                if plan.overlap
            ]
            plans = {}
            for name, changes in PLANS.items():
                with override_plan(**changes):
                    plans[name] = tuned.lora_linear(call, torch.device("meta"), 90)
            assert plans["overlapped"] in shipped or (not shipped and M <= 64)
            assert (plans["overlapped"].once, plans["overlapped"].overlap) == (False, True)
            for name in ("1 launch", "2 launches", "staying"):
                assert not plans[name].overlap
                assert plans[name][:2] != (128, 256) or factors == BF16, "too many registers without an overlap"
            assert (plans["1 launch"].once, plans["2 launches"].once) == (True, False)


@pytest.mark.parametrize(("target", "count"), [(80, 3), (89, 3), (90, 4), (120, 4), ("hip", 3), ("interpreter", 4)])
def test_ways_to_launch_that_a_gpu_has(target: int | str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "target", lambda device: target)
    device = "cpu" if target == "interpreter" else "cuda"
    assert len(ways(device)) == count
    assert ("overlapped" in ways(device)) == (count == 4)


@FULL
@pytest.mark.parametrize("mix", MIXES[:2], ids=str)
@pytest.mark.parametrize("M", [16, 64])
def test_few_rows_can_be_launched_so_too(M: int, mix: Mix) -> None:
    """Which the table does not do, and the triage times."""
    call = config.CallShape(M, 4096, 4096, False, False, False, True, *mix, False, 1)
    plan = config.launched(call, 90, overlap=True)
    for compiled in compile_launches(90, M, mix, rank=16, plan=plan, many=False):
        check_fits(compiled, 90)


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


def test_overlapping_is_chosen_for_many_adapters_too() -> None:
    """Modelled. Their shrink is launched in small blocks of more threads."""

    def plan(M: int, rank: int, **fields: Any) -> config.Plan:
        call = config.CallShape(M, 4096, 4096, True, False, False, True, BF16, BF16, BF16, False, rank // 16)
        return config.lora_linear(call._replace(**fields), 90)

    for fields in ({}, {"backward": True}, {"packed": True}, {"adapters": F32}):
        found = plan(4096, 64, **fields)
        assert found.overlap
        assert (found.SHRINK_M, found.shrink_warps, found.shrinks_together()) == (16, 8, 2)
    assert plan(64, 64).once
    assert plan(4096, 64, x=F16, weight=F16, adapters=F32).once
