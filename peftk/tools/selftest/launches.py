"""Lists the kernels that a run launches: on a GPU with torch's profiler, in Triton's interpreter by intercepting it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType

from peftk.tools.selftest.check import NotRunError


def gpu_kernels(run: Callable[[], object]) -> list[str]:
    """The names of all kernels that `run` launches, including torch's, and of copies and memsets."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
    if not names:
        raise NotRunError("torch.profiler recorded no kernel (CUPTI may need permission here)")
    return names


def interpreted_kernels(run: Callable[[], object]) -> list[str]:
    """The names of the Triton kernels that `run` executes in Triton's interpreter."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    launch = GridExecutor.__call__

    def record_and_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    GridExecutor.__call__ = record_and_launch
    try:
        run()
    finally:
        GridExecutor.__call__ = launch
    return names


def segments_kernels(rows: int) -> list[str]:
    """The launches that sort the ids of `rows` rows."""
    from peftk.triton_kernels.segments import TILE

    return ["segments_kernel"] if rows <= TILE else ["sort_kernel", "scan_kernel", "scatter_kernel"]
