"""Which kernels a run launches, counted: on a GPU by torch's profiler, in the interpreter where it starts one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType

from peftk.tools.selftest.check import NotRunError


def on_gpu(run: Callable[[], object]) -> list[str]:
    """Every kernel, torch's own too; copies between host and device and fills of memory by their names."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
    if not names:
        raise NotRunError("torch.profiler saw no kernel (CUPTI may need permission here)")
    return names


def interpreted(run: Callable[[], object]) -> list[str]:
    """The Triton kernels that run in Triton's interpreter."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    launch = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    GridExecutor.__call__ = counted
    try:
        run()
    finally:
        GridExecutor.__call__ = launch
    return names


def of_segments(rows: int) -> list[str]:
    """The launches that sort so many ids."""
    from peftk.triton_kernels.segments import TILE

    return ["segments_kernel"] if rows <= TILE else ["sort_kernel", "scan_kernel", "scatter_kernel"]
