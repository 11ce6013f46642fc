"""The kernels that the triage compiles before it launches them are found again by the launch."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from peftk.adapters.adapter import adapter_of
from peftk.backends import triton
from peftk.tools.triage.environment import compiled_kernels
from peftk.tools.triage.prepare import compiling_only
from peftk.triton_kernels import lora_linear as kernels
from tests.support.tiers import FULL
from tests.support.triton_aot import _Driver, gpu_target

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, cannot interpret")


def call() -> None:
    x, weight, A, B = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((16, 128), (64, 128), (8, 128), (64, 8))
    )
    triton.lora_linear(x, weight, None, adapter_of(A, B, 1.0))


@FULL
def test_a_launch_is_compiled_once_and_not_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Driver(gpu_target(90)))
    monkeypatch.setattr(kernels, "target", mock.Mock(return_value=90))
    for _ in range(2):
        kernels.lora_linear_kernel.device_caches.clear()  # as in another process
        with compiling_only():
            call()
        assert len(compiled_kernels(tmp_path)) == 1
    with pytest.raises(AttributeError):  # a launch, which the driver of no GPU has nothing for
        call()


def test_a_launcher_gets_no_kernel_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would launch a kept kernel itself the next time."""
    warmups: list[bool] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *, grid, warmup: warmups.append(warmup) or "a kernel")
    with compiling_only():
        assert kernels.lora_linear_kernel[(1,)]() is None
    assert kernels.lora_linear_kernel[(1,)]() == "a kernel"
    assert warmups == [True, False]
