"""Compiles Triton kernels for GPUs that need not be present, exactly as a launch on them would.

The real launcher runs on meta tensors, whose addresses and strides specialize like those of real, aligned tensors. The
driver names a target and compiles, but does not launch. The result is what ptxas or LLVM produced for each launch.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiled(NamedTuple):
    kernel: str
    registers: int
    spilled: int  # bytes of stack, for registers that did not fit
    shared: int
    tensor_memory: int  # columns; Triton compiles a trap if a kernel needs more than exist
    assembly: str  # PTX, or AMD's assembly


class _Driver:
    """The parts of a Triton driver that compiling needs. The device number is the target: each has a kernel cache."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def gpu_target(name: int | str) -> GPUTarget:
    return GPUTarget("hip", name, 64) if isinstance(name, str) else GPUTarget("cuda", name, 32)


@contextlib.contextmanager
def compiling(target: int | str, module: Any, kernels: tuple[str, ...]) -> Iterator[list[Compiled]]:
    """Inside, launches of module's `kernels` are compiled for the target (90, "gfx942") and listed, not launched."""
    compiled: list[Compiled] = []

    def compile_only(kernel: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            compiled.append(_inspect(kernel.run(*args, grid=(1,), warmup=True, **kwargs)))

        return launch

    name: int | str = "hip" if isinstance(target, str) else target
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(gpu_target(target))))
        if hasattr(module, "target"):
            stack.enter_context(mock.patch.object(module, "target", return_value=name))
        for kernel in kernels:
            replacement = mock.MagicMock()
            replacement.__getitem__.return_value = compile_only(getattr(module, kernel))
            stack.enter_context(mock.patch.object(module, kernel, replacement))
        yield compiled


def _inspect(kernel: Any) -> Compiled:
    name, shared = kernel.metadata.name, kernel.metadata.shared
    tensor_memory = getattr(kernel.metadata, "tmem_size", 0)  # AMD has none
    if "cubin" not in kernel.asm:
        assembly = kernel.asm["amdgcn"]
        counts = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly)}
        # scalar registers that do not fit are parked in lanes of vector registers, which takes no memory
        spilled = counts["private_segment_fixed_size"]
        return Compiled(name, counts["vgpr_count"], spilled, shared, tensor_memory, assembly)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    return Compiled(name, int(found["REG"]), spilled, shared, tensor_memory, kernel.asm["ptx"])
