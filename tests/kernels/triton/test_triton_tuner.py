"""Compiles the plans that the tuner may choose, for GPUs that need not be present."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process that does not interpret", allow_module_level=True)

from peftk.triton_kernels import config
from tests.support.tiers import spread
from tests.support.triton_calls import (
    BF16,
    F16,
    F32,
    MORE_TARGETS,
    TARGETS,
    check_fits,
    compile_launches,
    compile_wgrad,
)

# All calls that `tuner` measures.
FORMS = [
    (target, dtype, factors, M, many, backward)
    for target in [*TARGETS, *MORE_TARGETS]
    for dtype in (BF16, F16)
    for many, factors in ((False, F32), (False, dtype), (True, dtype))
    for M in config.ROW_LIMITS
    for backward in (False, True)
]


def config_target(target: int | str) -> int | str:
    return "hip" if isinstance(target, str) else target


@pytest.mark.parametrize(("target", "dtype", "factors", "M", "many", "backward"), spread(FORMS, default=0, full=6))
def test_candidates_compile(target: int | str, dtype: Any, factors: Any, M: int, many: bool, backward: bool) -> None:
    shape = config.CallShape(M, 4096, 4096, many, False, backward, True, dtype, dtype, factors, False, 1).shape_class()
    for plan in config.candidates(shape, config_target(target)):
        for compiled in compile_launches(target, M, (dtype, dtype, factors), many=many, backward=backward, plan=plan):
            check_fits(compiled, target)


WGRADS = [
    (target, dtype, rank, many)
    for target in [*TARGETS, *MORE_TARGETS]
    for dtype in (BF16, F16)
    for rank in (16, 64)
    for many in (False, True)
]


@pytest.mark.parametrize(("target", "dtype", "rank", "many"), spread(WGRADS, default=0, full=3))
def test_candidates_for_gradients_compile(target: int | str, dtype: Any, rank: int, many: bool) -> None:
    pages = config.wgrad_pages(rank, dtype, config_target(target))
    for block in config.wgrad_candidates(pages, many, True, dtype, config_target(target)):
        check_fits(compile_wgrad(target, dtype, dtype, rank, many=many, block=block), target)
