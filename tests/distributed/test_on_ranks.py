"""Tensor parallelism and FSDP2 on two and on four gloo ranks: everything equals one process."""

from __future__ import annotations

import pytest

from tests.support import ranks

pytest.importorskip("peft", reason="the checks shard accelerated PEFT models")
pytest.importorskip("transformers", reason="the checks shard models by their tp_plan")

MODULES = [
    f"tests.support.{name}"
    for name in ("dtensor_checks", "tensor_parallel_checks", "parallel_model_checks", "fsdp_checks")
]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_ranks_equal_one_process(world: int):
    found = ranks.run(world, *MODULES)
    failed = [error for error in found.values() if error]
    assert not failed, "\n".join(failed)
    expected = {name for module in MODULES for name in ranks.checks_of(module)}
    assert set(found) == expected


def test_a_failing_check_is_reported():
    """The run ends with the traceback of the rank that failed, although the others wait for it."""
    found = ranks.run(2, "tests.support.failing_checks")
    assert found["check_good"] == ""
    assert "rank 1 of 2" in found["check_one_rank_fails"]
    assert "on purpose" in found["check_one_rank_fails"]
    assert "check_later" not in found
