"""Where torch's matrix product beats our kernels on this machine's CPU, as measured once by `peftk tune`.

A measurement is a grid of shapes for each operation and dtype; a call takes the answer of the nearest shape. It is kept
in $PEFTK_CACHE_DIR/choice.json (else below $XDG_CACHE_HOME or ~/.cache), by processor, and holds for the versions and
the SIMD level that it was made with. Without one, our kernels serve, except where the processor has AMX tiles.

The choice never changes within a process, except by `tune`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import peftk
from peftk import backends
from peftk.backends import Call
from peftk.benchmark.environment import cpu_name
from peftk.benchmark.timing import interleave

OPS = ("lora_linear", "lora_linear_backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIMS = (512, 1024, 2048, 4096)
TOKENS = (1, 4, 16, 64, 256, 512)
RANK = 16

# A library that is so slow in a small shape is not asked for larger ones: some take half a minute.
_HOPELESS = 1 / 3
_AMX_TOKENS = 32


class Point(NamedTuple):
    """One shape of the grid. gain: how many times faster torch's product with our adapters was than our kernels."""

    M: int
    dim: int  # K and N
    gain: float


def verdict(call: Call) -> tuple[bool, str]:
    """Whether `gemm` is to be preferred to `cpu` for this call, and what says so."""
    if call.x_dtype != call.weight_dtype or call.x_dtype not in DTYPES.values():
        return False, "of mixed dtypes only our kernels make a product without a copy"
    if call.M * call.K * call.N <= backends.SMALL:
        return False, "a small call goes straight to our kernels"
    key = _key(call.op, call.x_dtype)
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


def may_prefer_gemm(op: str, dtype: torch.dtype) -> bool:
    """Whether there is a shape for which `verdict` prefers it."""
    key = _key(op, dtype)
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


def tune(progress: Callable[[str], None] = lambda _: None, *, seconds: float = 0.03) -> dict[str, list[Point]]:
    """Measures, keeps the result for later processes, and takes it in this one.

    Args:
        progress: told each shape before it is measured. seconds: for a shape, at most, as long as three calls take.

    Raises OSError where the cache cannot be written; the choice is as before then.
    """
    measured: dict[str, list[Point]] = {}
    for op in OPS:
        for dtype in DTYPES.values():
            progress(f"{op} {str(dtype).removeprefix('torch.')}")
            measured[_key(op, dtype)] = list(_measure(op, dtype, seconds))
    _save(measured)
    forget_loaded()
    return measured


def cache_file() -> Path:
    """Raises OSError where no folder is named and the user has no home."""
    folder = os.environ.get("PEFTK_CACHE_DIR")
    if folder:
        return Path(folder, "choice.json")
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "peftk", "choice.json")
    except RuntimeError as error:
        raise OSError("expected a home directory or PEFTK_CACHE_DIR, got neither") from error


def forget_loaded() -> None:
    """Reads the cache again at the next call."""
    _measured.cache_clear()
    backends.forget()


def forget() -> bool:
    """Deletes what was measured on this machine, and a file that cannot be read; whether there was something."""
    path = cache_file()
    try:
        found = _read(path)
        existed = found.pop(_machine(), None) is not None
        if existed:
            _write(path, found)
    except ValueError:
        path.unlink()
        existed = True
    forget_loaded()
    return existed


@functools.cache
def _measured() -> tuple[dict[str, list[Point]], str]:
    """The grids of this machine by op and dtype; or none, and why."""
    try:
        path = cache_file()
    except OSError as error:
        return {}, f"not measured on this machine ({error})"
    try:
        entry = _read(path).get(_machine())
        if entry is None:
            return {}, "not measured on this machine (peftk tune)"
        if entry["made_with"] != _made_with():
            return {}, f"measured with {entry['made_with']}, this is {_made_with()} (peftk tune again)"
        return {key: [_point(*point) for point in points] for key, points in entry["gain"].items()}, ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path}: expected what `peftk tune` writes, got {error!r}; ignored", stacklevel=2)
        return {}, f"{path} cannot be read (peftk tune writes a new one)"


def _point(M: int, dim: int, gain: float) -> Point:
    if not (0 < M < math.inf and 0 < dim < math.inf and gain >= 0):
        raise ValueError(f"expected M, K=N > 0 and a gain, got {M}, {dim} and {gain}")
    return Point(M, dim, gain)


def _machine() -> str:
    return f"{platform.machine()} {cpu_name()}"


def _made_with() -> dict[str, str]:
    from peftk.backends import cpu

    return {"torch": torch.__version__, "peftk": peftk.__version__, "simd_level": cpu.simd_level()}


def _key(op: str, dtype: torch.dtype) -> str:
    return f"{op.removeprefix('multi_')} {str(dtype).removeprefix('torch.')}"


def _save(measured: dict[str, list[Point]]) -> None:
    path = cache_file()
    try:
        entries = _read(path)
    except ValueError:
        entries = {}  # not worth keeping
    entries[_machine()] = {
        "made_with": _made_with(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "gain": measured,
    }
    _write(path, entries)


def _read(path: Path) -> dict[str, Any]:
    entries = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(entries, dict):
        raise ValueError(f"expected a JSON object, got {type(entries).__name__}")
    return entries


def _write(path: Path, entries: dict[str, Any]) -> None:
    """All or nothing: another process may be reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        try:
            json.dump(entries, file, indent=1)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def _measure(op: str, dtype: torch.dtype, seconds: float) -> Iterator[Point]:
    for M in TOKENS:
        gain = math.inf
        for dim in DIMS:
            if M * dim * dim <= backends.SMALL:
                continue
            if gain < _HOPELESS:
                yield Point(M, dim, gain)  # as in the next smaller shape
                continue
            gain = round(_gain(op, dtype, M, dim, seconds), 3)
            yield Point(M, dim, gain)


def _gain(op: str, dtype: torch.dtype, M: int, dim: int, seconds: float) -> float:
    sides = {name: functools.partial(_run, name, op, *_operands(dtype, M, dim)) for name in ("cpu", "gemm")}
    with torch.inference_mode():
        times = interleave(sides, seconds=seconds, repeats=50)
    return times["cpu"].median_us / times["gemm"].median_us


def _run(name: str, op: str, x: Tensor, weight: Tensor, adapter: Any, z: Tensor) -> None:
    server = backends.module(name)
    if op == "lora_linear":
        server.lora_linear(x, weight, None, adapter)
    else:
        server.lora_linear_backward(x, x, weight, adapter, z)


@functools.lru_cache(maxsize=1)
def _operands(dtype: torch.dtype, M: int, dim: int) -> tuple[Tensor, Tensor, Any, Tensor]:
    from peftk.table import Adapter

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(dim**-0.5).to(dtype)

    adapter = Adapter((random(RANK, dim),), (random(dim, RANK),), 1.0, "identity", None, None)
    return random(M, dim), random(dim, dim), adapter, torch.zeros(M, RANK)
