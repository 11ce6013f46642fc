"""`peftk tune`: measures where torch's matrix product beats our kernels on this machine's CPU; and tiles on its GPU.

`peftk.backends.measured` keeps the result and answers from it, `peftk.triton_kernels.tuned` that of the GPU. The choice
never changes within a process, except here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftk.adapters.adapter import Adapter
from peftk.backends import choice, measured, registry
from peftk.backends.call import LORA_LINEAR, Op
from peftk.backends.contract import Backend, served
from peftk.backends.measured import Point
from peftk.system.timing import interleave

if TYPE_CHECKING:
    from peftk.triton_kernels.tuner import TuningResult

OPS = (LORA_LINEAR, Op("lora_linear", backward=True))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIMS = (512, 1024, 2048, 4096)
TOKENS = (1, 4, 16, 64, 256, 512)
RANK = 16

# A library that is so slow in a small shape is not asked for larger ones: some take half a minute.
_HOPELESS = 1 / 3


def tune(progress: Callable[[str], None] = lambda _: None, *, seconds: float = 0.03) -> dict[str, list[Point]]:
    """Measures, keeps the result for later processes, and takes it in this one.

    Args:
        progress: told each shape before it is measured. seconds: for a shape, at most, as long as three calls take.

    Raises OSError where the cache cannot be written; the choice is as before then.
    """
    found: dict[str, list[Point]] = {}
    for op in OPS:
        for dtype in DTYPES.values():
            progress(f"{op} {str(dtype).removeprefix('torch.')}")
            found[measured.key_of(op, dtype)] = list(_measure(op, dtype, seconds))
    measured.save(found)
    choice.forget()
    return found


def has_gpu() -> bool:
    """Whether this machine has a GPU that the Triton kernels run on."""
    return torch.cuda.is_available()


def tune_gpu(progress: Callable[[str], None] = lambda _: None) -> tuple[dict[str, TuningResult], Path]:
    """Measures the plans of the Triton kernels on torch's current GPU. What was found, and the file that keeps it.

    Raises OSError where the cache cannot be written; the choice is as before then.
    """
    from peftk.triton_kernels import tuned, tuner

    found = tuner.tune(torch.device("cuda", torch.cuda.current_device()), progress)
    choice.forget()
    return found, tuned.cache_file()


def forget() -> bool:
    """Deletes what was measured on this machine, its CPU and its GPU; whether there was something."""
    existed = measured.delete()
    if has_gpu():
        from peftk.triton_kernels import tuned

        existed = tuned.delete(tuned.gpu(torch.device("cuda", torch.cuda.current_device()))) or existed
    choice.forget()
    return existed


def _measure(op: Op, dtype: torch.dtype, seconds: float) -> Iterator[Point]:
    for M in TOKENS:
        gain = math.inf
        for dim in DIMS:
            if M * dim * dim <= choice.SMALL:
                continue
            if gain < _HOPELESS:
                yield Point(M, dim, gain)  # as in the next smaller shape
                continue
            gain = round(_gain(op, dtype, M, dim, seconds), 3)
            yield Point(M, dim, gain)


def _gain(op: Op, dtype: torch.dtype, M: int, dim: int, seconds: float) -> float:
    operands = _operands(dtype, M, dim)
    sides = {name: functools.partial(_run, registry.backend(name), op, *operands) for name in ("cpu", "gemm")}
    with torch.inference_mode():
        times = interleave(sides, seconds=seconds, repeats=50)
    return times["cpu"].median_us / times["gemm"].median_us


def _run(server: Backend, op: Op, x: Tensor, weight: Tensor, adapter: Adapter, z: Tensor) -> None:
    if op.backward:
        served(server.backward).lora_linear_backward(x, x, weight, adapter, z)
    else:
        served(server.forward).lora_linear(x, weight, None, adapter)


def _operands(dtype: torch.dtype, M: int, dim: int) -> tuple[Tensor, Tensor, Adapter, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(dim**-0.5).to(dtype)

    adapter = Adapter((random(RANK, dim),), (random(dim, RANK),), 1.0, "identity", None, None)
    return random(M, dim), random(dim, dim), adapter, torch.zeros(M, RANK)
