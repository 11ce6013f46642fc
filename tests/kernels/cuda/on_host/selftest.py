"""The checks of `peftk selftest --device cuda` for the CUDA C++ backend, on the host, with stand-ins for a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable

import pytest

from peftk.tools.selftest import behaviour, parity
from peftk.tools.selftest.check import Check, Target
from tests.support.executor import Executor
from tests.support.stand_ins import rerun
from tests.support.tiers import spread

HERE = Target("cpu", "cpu", ("cuda",))


def kernels(run: Callable[[], object]) -> list[str]:
    """The names of the kernels that a run launches, one per launch."""
    executor = Executor(ctypes.CDLL(os.environ["PEFTK_CUDA_ON_HOST"]))
    executor.reset()
    run()
    return ["lora_linear_kernel"] * executor.statistics.launches


STAND_INS = behaviour.Tools(
    "aot_eager", kernels, rerun, lambda count: [contextlib.nullcontext] * count, contextlib.nullcontext
)
PARITY = list(parity.checks(HERE))


@pytest.mark.parametrize("check", list(behaviour.checks(HERE, STAND_INS)), ids=str)
def test_behaviour(check: Check) -> None:
    check.run()


def test_parity_has_every_operation() -> None:
    assert {check.op for check in PARITY} == {
        "lora_linear", "multi_lora_linear", "merge", "segments", "random decode steps"
    }  # fmt: skip


@pytest.mark.parametrize(
    "check",
    spread([check for check in PARITY if "131072" not in check.case], default=8, full=40),
    ids=str,
)
def test_parity(check: Check) -> None:
    assert check.run() <= 1.0
