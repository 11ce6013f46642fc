"""The CPU kernels read and write nothing outside their tensors, which are next to protected pages."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import subprocess
import sys

import pytest
import torch

from peftk import _cpu
from tests.support.guard_pages import guarded_copy
from tests.support.paths import ROOT


def child(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def test_the_kernels_stay_within_their_tensors() -> None:
    done = child("-m", "tests.support.guard_pages", *_cpu.simd_levels())
    last = done.stdout.rpartition("\n")[0].rpartition("\n")[2]
    assert done.returncode == 0, f"exit status {done.returncode}, {last}\n{done.stderr[-4000:]}"


def reading_kills(address: int) -> bool:
    if (reader := os.fork()) == 0:
        faulthandler.disable()
        ctypes.string_at(address, 4)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(reader, 0)[1])


@pytest.mark.parametrize(("behind", "outside"), [(True, 7), (False, -1)])
def test_an_element_outside_kills_the_process(behind: bool, outside: int) -> None:
    tensor = guarded_copy(torch.arange(7.0), behind)
    dead = [reading_kills(tensor.data_ptr() + 4 * number) for number in (0, 6, outside)]
    assert dead == [False, False, True]


@pytest.mark.parametrize("behind", [True, False])
def test_a_guarded_tensor_is_the_same_tensor(behind: bool) -> None:
    for tensor in (
        torch.randn(5, 7),
        torch.randn(5, 9).half()[:, 1:8],
        torch.randn(7, 5).t(),
        torch.randn(70, 90)[::3],
    ):
        copy = guarded_copy(tensor, behind)
        assert torch.equal(copy, tensor)
        assert copy.stride() == tensor.stride()
