"""`peftk tune`: measures when torch's matrix product is faster than our kernels, and which tiles are fastest on a GPU.

`peftk.backends.measured` stores and uses the first, for the CPU and the GPU; `peftk.triton_kernels.tuned` the tiles.
Only these functions change the choice of backend within a running process.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from peftk.adapters import table
from peftk.adapters.adapter import Adapter
from peftk.adapters.table import AdapterTable
from peftk.backends import blocking, choice, made_on, measured, registry
from peftk.backends.call import LORA_LINEAR, Op
from peftk.backends.contract import Backend, require
from peftk.backends.measured import Point
from peftk.system.timing import interleave
from peftk.triton_kernels.config import Layer

if TYPE_CHECKING:
    from peftk.triton_kernels.tuner import TuningResult
    from peftk.tuning.model_shapes import ModelShapes

OPS = (LORA_LINEAR, Op("lora_linear", backward=True))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIMS = (512, 1024, 2048, 4096)
TOKENS = (1, 4, 16, 64, 256, 512)
RANK = 16
ADAPTERS = 8  # in a batch with many
GPU_DIMS = (2048, 4096, 8192)
GPU_TOKENS = (64, 128, 256, 512, 1024, 4096)
MODEL_SECONDS = 170.0  # of measurements for one model; the one that has begun is finished

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
            grids[made_on.key_of(op, dtype, "cpu")] = list(_measure(op, dtype, seconds))
    measured.save(grids, "cpu")
    choice.forget()
    return grids


def has_gpu() -> bool:
    """Whether this machine has a GPU that the Triton kernels run on."""
    return torch.cuda.is_available()


class GpuTuning(NamedTuple):
    """The best plans by their key, the file they are in, and how many plans and points there was no time for."""

    plans: dict[str, TuningResult]
    file: Path
    left: int


def tune_gpu(progress: Callable[[str], None] = lambda _: None, *, model: ModelShapes | None = None) -> GpuTuning:
    """Measures the plans of the Triton kernels on torch's current GPU, then our kernels against torch's product.

    model: only the shapes of this model, in `MODEL_SECONDS` at most; what is left out keeps its plan and its choice.
    Raises OSError if the cache cannot be written. The choice of backend is then unchanged.
    """
    from peftk.triton_kernels import tuned, tuner

    device = torch.device("cuda", torch.cuda.current_device())
    if model is None:
        plans, left = tuner.tune(device, progress)
        grids = gpu_gains(device, progress, tuner.cuda_timer)
    else:
        until = time.monotonic() + MODEL_SECONDS
        layers = tuner.layers_of(model.sizes, [model.dtype])
        plans, left = tuner.tune(device, progress, layers=layers, of_sizes=True, seconds=MODEL_SECONDS)
        grids = gpu_gains(device, progress, tuner.cuda_timer, layers=layers, until=until)
        points = len(layers) * len(GPU_TOKENS) * len(OPS)
        left += points - sum(map(len, grids.values()))
    measured.save(measured.with_older(grids, "cuda"), "cuda")
    choice.forget()
    return GpuTuning(plans, tuned.cache_file(), left)


def gpu_gains(
    device: torch.device,
    progress: Callable[[str], None],
    timer: Callable[..., dict[str, float]],
    *,
    layers: Sequence[Layer] | None = None,
    tokens: Sequence[int] = GPU_TOKENS,
    until: float = math.inf,
) -> dict[str, list[Point]]:
    """The points of each operation and dtype on a GPU, as `tune` has them. timer: of functions by name, in µs.

    layers: by default square ones. until: on Python's monotonic clock, after which no measurement begins.
    """
    grids: dict[str, list[Point]] = {}
    for layer in _square_layers() if layers is None else layers:
        for op in (op._replace(many=layer.many) for op in OPS):
            key = made_on.key_of(op, layer.dtype, "cuda")
            progress(f"{key} N={layer.N} K={layer.K}, against torch's product")
            for M in tokens:
                if time.monotonic() <= until:
                    point = Point(M, round(math.sqrt(layer.N * layer.K)), _gpu_gain(op, layer, M, device, timer))
                    grids.setdefault(key, []).append(point)
    return grids


def _square_layers() -> list[Layer]:
    kinds = ((dtype, many) for dtype in DTYPES.values() for many in (False, True))
    return [Layer(dim, dim, dtype, dtype, many) for dtype, many in kinds for dim in GPU_DIMS]


def _gpu_gain(op: Op, layer: Layer, M: int, device: torch.device, timer: Callable[..., dict[str, float]]) -> float:
    operands = _operands(layer, M, device)
    sides = {name: functools.partial(_run, registry.backend(name), op, operands) for name in ("triton", "gemm")}
    with torch.inference_mode():
        times = timer(sides)
    return round(times["triton"] / times["gemm"], 3)


def forget() -> bool:
    """Deletes this machine's measurements, of CPU and GPU. Returns whether there were any."""
    existed = any([measured.delete(), blocking.delete()])
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
    operands = _operands(Layer(dim, dim, dtype, dtype, many=False), M, torch.device("cpu"))
    sides = {name: functools.partial(_run, registry.backend(name), op, operands) for name in ("cpu", "gemm")}
    with torch.inference_mode():
        times = interleave(sides, seconds=seconds, repeats=50)
    return times["cpu"].median_us / times["gemm"].median_us


class _Operands(NamedTuple):
    x: Tensor
    dy: Tensor
    weight: Tensor
    adapters: Adapter | AdapterTable
    ids: Tensor  # of many adapters
    z: Tensor


def _run(impl: Backend, op: Op, operands: _Operands) -> Any:
    x, dy, weight, adapters, ids, z = operands
    if isinstance(adapters, AdapterTable):
        if op.backward:
            return require(impl.backward).multi_lora_linear_backward(dy, x, weight, adapters, ids, z)
        return require(impl.forward).multi_lora_linear(x, weight, None, adapters, ids)
    if op.backward:
        return require(impl.backward).lora_linear_backward(dy, x, weight, adapters, z)
    return require(impl.forward).lora_linear(x, weight, None, adapters)


def _operands(layer: Layer, M: int, device: torch.device) -> _Operands:
    """Many adapters are ADAPTERS that alternate row by row, in a table."""
    N, K, dtype, factors, many = layer
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(K**-0.5).to(dtype)

    def adapter() -> Adapter:
        A, B = random(RANK, K, dtype=factors), random(N, RANK, dtype=factors)
        return Adapter((A,), (B,), 1.0, "identity", None, None)

    adapters: Adapter | AdapterTable = adapter()
    if many:
        adapters = table.build(tuple(adapter() for _ in range(ADAPTERS)), dtype=factors, device=device)
    ids = torch.arange(M, dtype=torch.int32, device=device) % ADAPTERS
    z = torch.zeros(M, RANK, device=device)
    return _Operands(random(M, K), random(M, N), random(N, K), adapters, ids, z)
