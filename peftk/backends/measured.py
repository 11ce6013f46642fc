"""What `peftk tune` has measured on this machine, and what follows from it for a call.

A measurement is a grid of shapes for each operation and dtype; a call takes the answer of the nearest shape. It is kept
in choice.json (`kept`), by processor, and holds for the versions and the SIMD level that it was made with. Without one,
our kernels serve, except where the processor has AMX tiles.
"""

from __future__ import annotations

import functools
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
    """One shape of the grid. gain: how many times faster torch's product with our adapters was than our kernels."""

    M: int
    dim: int  # K and N
    gain: float


def verdict(call: Call) -> tuple[bool, str]:
    """Whether `gemm` is to be preferred to `cpu` for this call, and what says so."""
    key = key_of(call.op, call.x_dtype)
    measured, problem = _measured()
    points = measured.get(key)
    if not points:
        return _default(call, problem)
    nearest = min(points, key=lambda p: abs(math.log(p.M / call.M)) + abs(math.log(p.dim**2 / (call.K * call.N))))
    where = f"measured at M={nearest.M}, K=N={nearest.dim}: torch's GEMM is {nearest.gain:.2f} times as fast"
    return nearest.gain >= margin(key), f"{where}, wanted {margin(key):g} or more"


def margin(key: str) -> float:
    """How many times as fast torch's product must be to serve; in 16 bits it costs a second rounding."""
    return 1.05 if key.endswith("float32") else 1.15


def may_prefer_gemm(op: Op, dtype: torch.dtype) -> bool:
    """Whether there is a shape for which `verdict` prefers it."""
    key = key_of(op, dtype)
    points = _measured()[0].get(key)
    if not points:
        return _has_tiles(dtype)
    return any(point.gain >= margin(key) for point in points)


def _default(call: Call, problem: str) -> tuple[bool, str]:
    if _has_tiles(call.x_dtype) and call.M >= _AMX_TOKENS:
        return True, f"{problem}; by default many bf16 tokens go to AMX tiles, which torch's GEMM uses"
    return False, f"{problem}; our kernels are the default"


def _has_tiles(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def cache_file() -> Path:
    """Raises OSError where no folder is named and the user has no home."""
    return cache.path(_FILE)


def delete() -> bool:
    """Deletes what was measured on this machine, and a file that cannot be read; whether there was something."""
    return cache.delete(_FILE, _machine())


@functools.cache
def _measured() -> tuple[dict[str, list[Point]], str]:
    """The grids of this machine by op and dtype; or none, and why."""
    found, problem = cache.load(_FILE, _machine(), _made_with(), _points, done="measured", here="machine")
    return found or {}, problem


def _points(entry: dict[str, Any]) -> dict[str, list[Point]]:
    return {key: [_point(*point) for point in points] for key, points in entry["gain"].items()}


def _point(M: int, dim: int, gain: float) -> Point:
    if not (0 < M < math.inf and 0 < dim < math.inf and gain >= 0):
        raise ValueError(f"expected M, K=N > 0 and a gain, got {M}, {dim} and {gain}")
    return Point(M, dim, gain)


def _machine() -> str:
    return f"{platform.machine()} {cpu_name()}"


def _made_with() -> dict[str, str]:
    from peftk.backends import cpu

    return {"torch": torch.__version__, "peftk": __version__, "simd_level": cpu.simd_level()}


def key_of(op: Op, dtype: torch.dtype) -> str:
    """What a grid is kept under: one adapter or many are alike."""
    return f"{op._replace(many=False)} {str(dtype).removeprefix('torch.')}"


def save(measured: dict[str, list[Point]]) -> None:
    """Keeps a measurement of this machine. Raises OSError where the cache cannot be written."""
    cache.save(_FILE, _machine(), _made_with(), {"threads": torch.get_num_threads(), "gain": measured})


def forget_loaded() -> None:
    """Reads the cache again at the next question."""
    _measured.cache_clear()
