"""Whether torch's GEMM is faster than our kernels for a call, as measured by `peftk tune` on this machine.

A measurement is a grid of shapes for each operation and dtype; a call uses the nearest shape. It is kept in choice.json
(`peftk.system.cache`) by processor or GPU, and is valid for the versions (and the SIMD level) that it was made with.
Without a measurement, on a CPU the first call of a class of shapes measures it, or a shipped table decides
(`peftk.backends.first_use`), and on a GPU a model of its waves (`peftk.triton_kernels.modelled`).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peftk.backends import first_use, made_on
from peftk.backends.made_on import Verdict, key_of, margin, verdict_of
from peftk.system import cache

if TYPE_CHECKING:
    from peftk.backends.call import Call, Op

_FILE = "choice.json"


class Point(NamedTuple):
    """One shape of the grid. gain: time of our kernels / time of torch's GEMM with our adapters."""

    M: int
    dim: int  # K and N; of a layer that is not square, √(K·N)
    gain: float


def verdict(call: Call) -> Verdict:
    """Whether to prefer `gemm` to our own kernels for this call, and the reason."""
    if call.device == "cuda" and not torch.cuda.is_available():
        return Verdict(False, "torch finds no GPU here; our kernels are the default")
    key = key_of(call.op, call.x_dtype, call.device)
    measured, problem = _load_grids(call.device)
    points = measured.get(key)
    if not points:
        return first_use.verdict(call, problem) if call.device == "cpu" else _default_on_gpu(call, problem)
    nearest = min(points, key=lambda p: abs(math.log(p.M / call.M)) + abs(math.log(p.dim**2 / (call.K * call.N))))
    return verdict_of(key, nearest.gain, f"measured at M={nearest.M}, K=N={nearest.dim}")


def _default_on_gpu(call: Call, problem: str) -> Verdict:
    from peftk.backends import gpu_shape
    from peftk.triton_kernels import modelled

    major, minor = torch.cuda.get_device_capability()
    target: int | str = "hip" if torch.version.hip else 10 * major + minor
    key = key_of(call.op, call.x_dtype, call.device)
    library, reason = modelled.prefer_library(gpu_shape.of(call), target, margin(key))
    return Verdict(library, f"{problem}; {reason}")


def may_prefer_gemm(op: Op, dtype: torch.dtype) -> bool:
    """Whether `verdict` prefers `gemm` for any shape on the CPU, or may after a measurement."""
    key = key_of(op, dtype, "cpu")
    points = _load_grids("cpu")[0].get(key)
    return any(point.gain >= margin(key) for point in points) if points else first_use.may_prefer_gemm(dtype)


def cache_file() -> Path:
    """The path of choice.json. Raises OSError if PEFTK_CACHE_DIR is not set and the user has no home."""
    return cache.path(_FILE)


def delete() -> bool:
    """Deletes this machine's measurements, or the file if it is broken. Returns whether there was any."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return any([first_use.delete(), *(cache.delete(_FILE, made_on.machine(device)) for device in devices)])


@functools.cache
def _load_grids(device: str) -> tuple[dict[str, list[Point]], str]:
    """The grids of the CPU or GPU by op and dtype, and an empty string; or an empty dict, and why there are none."""
    unit = "machine" if device == "cpu" else "GPU"
    name, made_with = made_on.machine(device), made_on.versions(device)
    grids, problem = cache.load(_FILE, name, made_with, _parse_grids, verb="measured", unit=unit)
    return grids or {}, problem


def _parse_grids(entry: dict[str, Any]) -> dict[str, list[Point]]:
    return {key: [_parse_point(*point) for point in points] for key, points in entry["gain"].items()}


def _parse_point(M: int, dim: int, gain: float) -> Point:
    if not (0 < M < math.inf and 0 < dim < math.inf and gain >= 0):
        raise ValueError(f"expected M, K=N > 0 and a gain, got {M}, {dim} and {gain}")
    return Point(M, dim, gain)


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
    cache.save(_FILE, made_on.machine(device), made_on.versions(device), {**threads, "gain": measured})


def forget_loaded() -> None:
    """Makes the next call read the cache files again."""
    _load_grids.cache_clear()
    first_use.forget_loaded()
