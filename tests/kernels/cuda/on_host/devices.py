"""Launchers use the device that they are given, and do not change this thread's current device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from peftk import functional
from peftk.adapters.adapter import Adapter
from peftk.backends import cuda as backend
from tests.support.executor import Executor

BF16 = torch.bfloat16


def lora_linear() -> None:
    backend.lora_linear(torch.ones(2, 64, dtype=BF16), torch.ones(8, 64, dtype=BF16), None, Adapter((), (), 1.0))


def segments() -> None:
    backend.segments(torch.zeros(3, dtype=torch.int32), 2)


def merge_and_unmerge() -> None:
    weight = torch.ones(8, 64)
    receipt = functional.merge_(weight, torch.ones(2, 64), torch.ones(8, 2), 1.0, backend="cuda")
    functional.unmerge_(weight, receipt, backend="cuda")


@pytest.mark.parametrize("call", [lora_linear, segments, merge_and_unmerge])
@pytest.mark.parametrize("device", [0, 1])
def test_the_device_is_the_one_asked_for(
    executor: Executor, monkeypatch: pytest.MonkeyPatch, call: Callable[[], None], device: int
) -> None:
    monkeypatch.setattr(backend, "_device_and_stream", lambda _: (device, 0))
    call()
    assert executor.statistics.launches > 0
    assert executor.statistics.device == device
    assert executor.current_device() == 0


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, executor: Executor) -> None:
    monkeypatch.setattr(backend, "_device_and_stream", lambda _: (2, 0))
    for call in (lora_linear, segments, merge_and_unmerge):
        with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
            call()
    assert executor.statistics.launches == 0
    assert executor.current_device() == 0
