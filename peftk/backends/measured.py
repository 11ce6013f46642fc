"""Whether torch's GEMM is faster than our kernels for a call, as measured by `peftk tune` on this machine.

A measurement is a grid of shapes for each operation and dtype; a call uses the nearest shape. It is kept in choice.json
(`peftk.system.cache`) by processor or GPU, and is valid for the versions (and the SIMD level) that it was made with.
Without a measurement our kernels run, except for bf16 on a processor with AMX tiles, and on a GPU where a model of its
waves says otherwise (`peftk.triton_kernels.modelled`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peftk.system import cache
from peftk.system.processor import cpu_name
from peftk.system.version import __version__

if TYPE_CHECKING:
    from peftk.backends.call import Call, Op

_FILE = "choice.json"
_AMX_TOKENS = 32


class Point(NamedTuple):
    """One shape of the grid. gain: time of our kernels / time of torch's GEMM with our adapters."""

    M: int
    dim: int  # K and N; of a layer that is not square, √(K·N)
    gain: float


def verdict(call: Call) -> tuple[bool, str]:
    """Whether to prefer `gemm` to our own kernels for this call, and the reason."""
    if call.device == "cuda" and not torch.cuda.is_available():
        return False, "torch finds no GPU here; our kernels are the default"
    key = key_of(call.op, call.x_dtype, call.device)
    measured, problem = _load_grids(call.device)
    points = measured.get(key)
    if not points:
        return _default(call, problem) if call.device == "cpu" else _default_on_gpu(call, problem)
    nearest = min(points, key=lambda p: abs(math.log(p.M / call.M)) + abs(math.log(p.dim**2 / (call.K * call.N))))
    where = f"measured at M={nearest.M}, K=N={nearest.dim}: torch's GEMM is {nearest.gain:.2f} times as fast"
    return nearest.gain >= margin(key), f"{where}, wanted {margin(key):g} or more"


def margin(key: str) -> float:
    """The gain from which `gemm` is preferred. Higher in 16 bits, where it costs a second rounding."""
    return 1.05 if key.endswith("float32") else 1.15


def may_prefer_gemm(op: Op, dtype: torch.dtype) -> bool:
    """Whether `verdict` prefers `gemm` for any shape on the CPU."""
    key = key_of(op, dtype, "cpu")
    points = _load_grids("cpu")[0].get(key)
    if not points:
        return _has_amx_tiles(dtype)
    return any(point.gain >= margin(key) for point in points)


def _default(call: Call, problem: str) -> tuple[bool, str]:
    if _has_amx_tiles(call.x_dtype) and call.M >= _AMX_TOKENS:
        return True, f"{problem}; by default many bf16 tokens go to AMX tiles, which torch's GEMM uses"
    return False, f"{problem}; our kernels are the default"


def _default_on_gpu(call: Call, problem: str) -> tuple[bool, str]:
    from peftk.backends import gpu_shape
    from peftk.triton_kernels import modelled

    major, minor = torch.cuda.get_device_capability()
    target: int | str = "hip" if torch.version.hip else 10 * major + minor
    key = key_of(call.op, call.x_dtype, call.device)
    library, reason = modelled.prefer_library(gpu_shape.of(call), target, margin(key))
    return library, f"{problem}; {reason}"


def _has_amx_tiles(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def cache_file() -> Path:
    """The path of choice.json. Raises OSError if PEFTK_CACHE_DIR is not set and the user has no home."""
    return cache.path(_FILE)


def delete() -> bool:
    """Deletes this machine's measurements, or the file if it is broken. Returns whether there was any."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return any([cache.delete(_FILE, _machine(device)) for device in devices])


@functools.cache
def _load_grids(device: str) -> tuple[dict[str, list[Point]], str]:
    """The grids of the CPU or GPU by op and dtype, and an empty string; or an empty dict, and why there are none."""
    unit = "machine" if device == "cpu" else "GPU"
    name, made_with = _machine(device), _made_with(device)
    grids, problem = cache.load(_FILE, name, made_with, _parse_grids, verb="measured", unit=unit)
    return grids or {}, problem


def _parse_grids(entry: dict[str, Any]) -> dict[str, list[Point]]:
    return {key: [_parse_point(*point) for point in points] for key, points in entry["gain"].items()}


def _parse_point(M: int, dim: int, gain: float) -> Point:
    if not (0 < M < math.inf and 0 < dim < math.inf and gain >= 0):
        raise ValueError(f"expected M, K=N > 0 and a gain, got {M}, {dim} and {gain}")
    return Point(M, dim, gain)


def _machine(device: str) -> str:
    return f"{platform.machine()} {cpu_name()}" if device == "cpu" else torch.cuda.get_device_name()


def _made_with(device: str) -> dict[str, str]:
    versions = {"torch": torch.__version__, "peftk": __version__}
    if device != "cpu":
        return {**versions, "triton": importlib.metadata.version("triton")}
    from peftk.backends import cpu

    return {**versions, "simd_level": cpu.simd_level()}


def key_of(op: Op, dtype: torch.dtype, device: str) -> str:
    """The key of a grid. On a CPU one adapter and many share a grid; on a GPU their tiles differ."""
    return f"{op._replace(many=op.many and device != 'cpu')} {str(dtype).removeprefix('torch.')}"


def with_older(measured: dict[str, list[Point]], device: str) -> dict[str, list[Point]]:
    """The measurement, and what was measured before of other shapes. Of two gains of one shape the smaller counts."""
    grids = {key: {(point.M, point.dim): point for point in points} for key, points in _load_grids(device)[0].items()}
    for key, points in measured.items():
        by_gain = sorted(points, key=lambda point: -point.gain)
        grids.setdefault(key, {}).update({(point.M, point.dim): point for point in by_gain})
    return {key: list(points.values()) for key, points in grids.items()}


def save(measured: dict[str, list[Point]], device: str) -> None:
    """Writes the measurement of the CPU or the GPU. Raises OSError if the cache cannot be written."""
    threads = {"threads": torch.get_num_threads()} if device == "cpu" else {}
    cache.save(_FILE, _machine(device), _made_with(device), {**threads, "gain": measured})


def forget_loaded() -> None:
    """Makes the next call read the cache file again."""
    _load_grids.cache_clear()
