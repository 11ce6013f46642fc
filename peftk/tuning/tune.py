"""`peftk tune`: measures when torch's matrix product is faster than our kernels, and which tiles are fastest on a GPU.

`peftk.backends.measured` stores and uses the first, for the CPU and the GPU; `peftk.triton_kernels.tuned` the tiles.
Only these functions change the choice of backend within a running process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from peftk.adapters import table
from peftk.adapters.adapter import Adapter
from peftk.adapters.table import AdapterTable
from peftk.backends import choice, measured, registry
from peftk.backends.call import LORA_LINEAR, Op
from peftk.backends.contract import Backend, require
from peftk.backends.measured import Point
from peftk.system.timing import interleave

if TYPE_CHECKING:
    from peftk.triton_kernels.tuner import TuningResult

OPS = (LORA_LINEAR, Op("lora_linear", backward=True))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIMS = (512, 1024, 2048, 4096)
TOKENS = (1, 4, 16, 64, 256, 512)
RANK = 16
ADAPTERS = 8  # in a batch with many
GPU_DIMS = (2048, 4096, 8192)
GPU_TOKENS = (64, 128, 256, 512, 1024, 4096)

# Below this gain, larger shapes are not measured: some libraries would take half a minute.
_MIN_GAIN = 1 / 3


def tune(progress: Callable[[str], None] = lambda _: None, *, seconds: float = 0.03) -> dict[str, list[Point]]:
    """Measures torch's matrix product against our CPU kernels, and uses the result in this and later processes.

    Args:
        progress: called with each operation and dtype before it is measured.
        seconds: the time per shape, in seconds; at least three calls are timed, or one if it takes longer than that.

    Returns:
        For each operation and dtype, as in "lora_linear float32", its points: M, K = N, and the gain: time of our
        kernels / time of torch's product with our adapters.

    Raises:
        OSError: the cache cannot be written. The choice of backend is then unchanged.
    """
    grids: dict[str, list[Point]] = {}
    for op in OPS:
        for dtype in DTYPES.values():
            progress(f"{op} {str(dtype).removeprefix('torch.')}")
            grids[measured.key_of(op, dtype, "cpu")] = list(_measure(op, dtype, seconds))
    measured.save(grids, "cpu")
    choice.forget()
    return grids


def has_gpu() -> bool:
    """Whether this machine has a GPU that the Triton kernels run on."""
    return torch.cuda.is_available()


def tune_gpu(progress: Callable[[str], None] = lambda _: None) -> tuple[dict[str, TuningResult], Path]:
    """Measures the plans of the Triton kernels on torch's current GPU, then our kernels against torch's product.

    Returns the best plans and their file. Raises OSError if the cache cannot be written. The choice of backend is then
    unchanged.
    """
    from peftk.triton_kernels import tuned, tuner

    device = torch.device("cuda", torch.cuda.current_device())
    plans = tuner.tune(device, progress)
    measured.save(gpu_gains(device, progress, tuner.cuda_timer), "cuda")
    choice.forget()
    return plans, tuned.cache_file()


def gpu_gains(
    device: torch.device,
    progress: Callable[[str], None],
    timer: Callable[..., dict[str, float]],
    *,
    tokens: Sequence[int] = GPU_TOKENS,
    dims: Sequence[int] = GPU_DIMS,
) -> dict[str, list[Point]]:
    """The points of each operation and dtype on a GPU, as `tune` has them. timer: of functions by name, in µs."""
    grids = {}
    for op in (op._replace(many=many) for op in OPS for many in (False, True)):
        for dtype in DTYPES.values():
            key = measured.key_of(op, dtype, "cuda")
            progress(f"{key}, against torch's product")
            grids[key] = [Point(M, dim, _gpu_gain(op, dtype, M, dim, device, timer)) for M in tokens for dim in dims]
    return grids


def _gpu_gain(
    op: Op, dtype: torch.dtype, M: int, dim: int, device: torch.device, timer: Callable[..., dict[str, float]]
) -> float:
    operands = _operands(dtype, M, dim, device, many=op.many)
    sides = {name: functools.partial(_run, registry.backend(name), op, operands) for name in ("triton", "gemm")}
    with torch.inference_mode():
        times = timer(sides)
    return round(times["triton"] / times["gemm"], 3)


def forget() -> bool:
    """Deletes this machine's measurements, of CPU and GPU. Returns whether there were any."""
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
            if M * dim * dim <= choice.SMALL_CALL:
                continue
            if gain < _MIN_GAIN:
                yield Point(M, dim, gain)  # the gain of the next smaller shape
                continue
            gain = round(_gain(op, dtype, M, dim, seconds), 3)
            yield Point(M, dim, gain)


def _gain(op: Op, dtype: torch.dtype, M: int, dim: int, seconds: float) -> float:
    operands = _operands(dtype, M, dim, torch.device("cpu"), many=False)
    sides = {name: functools.partial(_run, registry.backend(name), op, operands) for name in ("cpu", "gemm")}
    with torch.inference_mode():
        times = interleave(sides, seconds=seconds, repeats=50)
    return times["cpu"].median_us / times["gemm"].median_us


class _Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    adapters: Adapter | AdapterTable
    ids: Tensor  # of many adapters
    z: Tensor


def _run(impl: Backend, op: Op, operands: _Operands) -> Any:
    x, weight, adapters, ids, z = operands
    if isinstance(adapters, AdapterTable):
        if op.backward:
            return require(impl.backward).multi_lora_linear_backward(x, x, weight, adapters, ids, z)
        return require(impl.forward).multi_lora_linear(x, weight, None, adapters, ids)
    if op.backward:
        return require(impl.backward).lora_linear_backward(x, x, weight, adapters, z)
    return require(impl.forward).lora_linear(x, weight, None, adapters)


def _operands(dtype: torch.dtype, M: int, dim: int, device: torch.device, *, many: bool) -> _Operands:
    """many: ADAPTERS that alternate row by row, in a table; else one adapter."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(dim**-0.5).to(device, dtype)

    def adapter() -> Adapter:
        return Adapter((random(RANK, dim),), (random(dim, RANK),), 1.0, "identity", None, None)

    adapters: Adapter | AdapterTable = adapter()
    if many:
        adapters = table.build(tuple(adapter() for _ in range(ADAPTERS)), dtype=dtype, device=device)
    ids = torch.arange(M, dtype=torch.int32, device=device) % ADAPTERS
    return _Operands(random(M, dim), random(dim, dim), adapters, ids, torch.zeros(M, RANK, device=device))
