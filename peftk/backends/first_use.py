"""Measures our kernels beside torch's matrix product when a class of shapes is first used on this machine's CPU.

A class is an operation, a dtype, a range of M and a size of W; it is measured in one shape that stands for all of it.
That takes at most CLASS_SECONDS, and all classes together at most ALL_SECONDS, once for a machine: the results are kept
in first_use.json (`peftk.system.cache`) for the versions that they were made with, and the same cache gives the same
choices, so the same bits. Nothing is measured where `peftk tune` has measured, while operations are recorded, for
deterministic algorithms (`peftk.backends.choice`), where the results can't be kept, or with PEFTK_FIRST_USE=0. There
the shipped table decides (`peftk.backends.shipped`).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peftk.adapters.adapter import Adapter
from peftk.backends import made_on, registry, shipped
from peftk.backends.contract import require
from peftk.backends.made_on import Verdict
from peftk.system import cache
from peftk.system.recording import is_recording
from peftk.system.timing import interleave

if TYPE_CHECKING:
    from peftk.backends.call import Call

CLASS_SECONDS, ALL_SECONDS = 0.05, 1.0
_FILE = "first_use.json"
_RANK = 16
# (from M on, measured with as many tokens). Many tokens take as long for each as these.
_TOKENS = ((64, 128), (8, 16), (2, 4), (1, 1))
_WORK, _WEIGHTS = 1 << 28, 1 << 22  # multiply-adds, elements of W: beyond, fewer output columns are measured


class _Shape(NamedTuple):
    M: int
    N: int
    K: int

    def __str__(self) -> str:
        return f"M={self.M}, N={self.N}, K={self.K}"


class _Entry(NamedTuple):
    """seconds: spent so far. gains: by class; time of our kernels / time of torch's product with our adapters, or None
    where that is too slow or too noisy to be measured."""

    seconds: float
    gains: dict[str, float | None]


def verdict(call: Call, problem: str) -> Verdict:
    """The choice for a call for which `peftk tune` has measured nothing; problem: why not."""
    gain = _load().gains.get(_class_of(call))
    if gain is not None:
        return made_on.verdict_of(_key_of(call), gain, f"measured at first use at {_shape_of(call)}")
    row = shipped.row_for(call.x_dtype)
    why_not = _why_not_measured(call, row)
    reason = f"{problem}; {row.why}; {why_not or 'the first call measures both'}"
    gemm = row.gemm_from is not None and row.gemm_from <= call.M
    return Verdict(gemm, reason, unmeasured=not why_not)


def may_prefer_gemm(dtype: torch.dtype) -> bool:
    """Whether `verdict` prefers `gemm` for any shape, or may after a measurement."""
    row = shipped.row_for(dtype)
    return not row.known or row.gemm_from is not None


def _why_not_measured(call: Call, row: shipped.Row) -> str:
    """Why the first call of this class does not measure it, or an empty string."""
    entry = _load()
    if row.known:
        return "known without a measurement"
    if os.environ.get("PEFTK_FIRST_USE") == "0":
        return "not measured at first use (PEFTK_FIRST_USE=0)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "not measured where kernels are interpreted"
    M, N, K = _shape_of(call)
    if N * K > _WEIGHTS or M * N * K > _WORK:
        return "too large to be measured at first use"
    if _class_of(call) in entry.gains:
        return "too slow or too noisy to be measured at first use"
    if entry.seconds >= ALL_SECONDS:
        return f"{ALL_SECONDS:g} s of measuring at first use are spent"
    return _not_kept


def measure(call: Call) -> bool:
    """Measures the class of `call`, unless another process has done so. Returns whether `verdict` may have changed.

    It waits for nobody: while another thread or process measures, the table decides.
    """
    lock = _lock
    if is_recording() or _is_capturing() or not lock.acquire(blocking=False):
        return False
    try:
        with _locked_file() as locked:
            return locked and _measure_alone(call)
    except _NotKeptError as error:
        _set_not_kept(f"a measurement at first use could not be kept ({error})")
        return True
    finally:
        lock.release()


def _measure_alone(call: Call) -> bool:
    entry = _read()
    if _class_of(call) not in entry.gains and entry.seconds < ALL_SECONDS:
        began = time.perf_counter()
        try:
            gain = _gain(call)
        except (RuntimeError, MemoryError):  # no memory for it, say; the call itself may well run
            gain = None
        spent = entry.seconds + time.perf_counter() - began
        _save(_Entry(spent, {**entry.gains, _class_of(call): gain}))
    _load.cache_clear()
    return True


def delete() -> bool:
    """Deletes this machine's measurements. Returns whether there were any."""
    return cache.delete(_FILE, made_on.machine("cpu"))


def forget_loaded() -> None:
    """Makes the next call read the cache file again, and try to write it."""
    _set_not_kept("")


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class _NotKeptError(Exception):
    """The cache cannot be written."""


_not_kept = ""  # why the results cannot be kept


def _set_not_kept(why: str) -> None:
    global _not_kept
    _not_kept = why
    _load.cache_clear()


_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # another thread of the parent may have held it


@functools.cache
def _load() -> _Entry:
    return _read()


def _read() -> _Entry:
    machine, versions = made_on.machine("cpu"), made_on.versions("cpu")
    entry, _ = cache.load(_FILE, machine, versions, _parse, verb="measured", unit="machine")
    return entry or _Entry(0.0, {})


def _parse(entry: dict[str, Any]) -> _Entry:
    gains = {str(name): None if gain is None else float(gain) for name, gain in entry["gain"].items()}
    for gain in (entry["seconds"], *gains.values()):
        if gain is not None and not (0 <= gain < math.inf):
            raise ValueError(f"expected seconds and gains of 0 or more, got {gain}")
    return _Entry(float(entry["seconds"]), gains)


def _save(entry: _Entry) -> None:
    content = {"seconds": round(entry.seconds, 3), "threads": torch.get_num_threads(), "gain": entry.gains}
    try:
        cache.save(_FILE, made_on.machine("cpu"), made_on.versions("cpu"), content)
    except OSError as error:
        raise _NotKeptError(error) from error


@contextlib.contextmanager
def _locked_file() -> Iterator[bool]:
    """Whether this process has the lock. A forked child has the file open too, so it is unlocked, not just closed."""
    try:
        file = cache.path(_FILE).with_suffix(".lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("w")
    except OSError as error:
        raise _NotKeptError(error) from error
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise _NotKeptError(error) from error
        try:
            yield True
        finally:
            fcntl.flock(opened, fcntl.LOCK_UN)


def _key_of(call: Call) -> str:
    return made_on.key_of(call.op, call.x_dtype, "cpu")


def _class_of(call: Call) -> str:
    return f"{_key_of(call)}, {_shape_of(call)}"


def _shape_of(call: Call) -> _Shape:
    """The shape that stands for the class of a call."""
    M = next(measured for first, measured in _TOKENS if first <= call.M)
    contraction, columns = (call.N, call.K) if call.op.backward else (call.K, call.N)
    columns = min(columns, max(min(_WORK // M, _WEIGHTS) // contraction // 64, 1) * 64)
    return _Shape(M, contraction, columns) if call.op.backward else _Shape(M, columns, contraction)


@torch.inference_mode()
def _gain(call: Call) -> float | None:
    ours, library = _side("cpu", call), _side("gemm", call)
    if max(_seconds(ours), _seconds(library)) > CLASS_SECONDS / 4:
        return None
    times = interleave({"ours": ours, "library": library}, seconds=CLASS_SECONDS / 4, repeats=30)
    if times["ours"].repeats < 3:
        return None
    gains = [
        times["ours"].median_us / times["library"].median_us,
        times["ours"].p10_us / times["library"].p10_us,
    ]
    margin = made_on.margin(_key_of(call))
    agree = min(gains) >= margin or max(gains) < margin
    return round(gains[0], 3) if agree else None


def _side(name: str, call: Call) -> Callable[[], Any]:
    """A call of the class's shape on a backend. All values are alike; the time does not depend on them."""
    M, N, K = _shape_of(call)
    implementation = registry.backend(name)

    def full(*shape: int) -> torch.Tensor:
        return torch.full(shape, 2.0**-6, dtype=call.x_dtype, device="cpu")

    x, weight, adapter = full(M, K), full(N, K), Adapter((full(_RANK, K),), (full(N, _RANK),), 1.0)
    if not call.op.backward:
        return lambda: require(implementation.forward).lora_linear(x, weight, None, adapter)
    dy, z = full(M, N), torch.zeros(M, _RANK, dtype=torch.float32, device="cpu")
    return lambda: require(implementation.backward).lora_linear_backward(dy, x, weight, adapter, z)


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
