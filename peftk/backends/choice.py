"""Decides which backend runs a call. `peftk.backends.contract` says what a backend is.

`reference` (plain torch, any device) · `cpu` (C++ SIMD) · `gemm` (torch's matrix product, our adapters on top) ·
`triton` (GPUs; CPU tensors under TRITON_INTERPRET=1) · `cuda` (CUDA C++, where it can run). The choice depends on the
call, on what was measured on this machine, by `peftk tune` (`peftk.backends.measured`) or at the first use of such a
shape (`peftk.backends.first_use`), on what is shipped for where nothing was (`shipped`; on a GPU a model of it), and on
torch's switch for deterministic algorithms and `peftk.deterministic`, which exclude `gemm`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch

from peftk.backends import determinism, first_use, measured, registry
from peftk.backends.call import LORA_LINEAR, SEGMENTS, BackendError, Call, Choice
from peftk.backends.contract import Backend
from peftk.backends.made_on import Verdict

# The first backend that can run the call is chosen. The reference runs every call, so there is always one.
_ORDER = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
# On any device: only the kernels of cuda and triton read sorted rows.
_SEGMENTS_ORDER = ("cuda", "triton", "reference")


_F = TypeVar("_F", bound=Callable[..., Any])
_remembered: list[Any] = []


def remembered(function: _F) -> _F:
    """Caches a function of hashable arguments whose results follow from what was measured; `forget` clears it."""
    _remembered.append(functools.lru_cache(maxsize=4096)(function))
    return cast(_F, _remembered[-1])


# Up to this many multiply-adds (M·N·K), overhead dominates a call on a CPU: `cpu` runs it whatever was measured.
SMALL_CALL = 1 << 22
NO_LIMIT = 1 << 62


def choose(call: Call, forced: str | None = None) -> Choice:
    """The backend for `call`. Raises BackendError if a forced backend cannot run it.

    A backend is forced by `forced`, else by an enclosing `forcing`, else by PEFTK_BACKEND.
    """
    forced = forced or _forced.get() or os.environ.get("PEFTK_BACKEND") or None
    invariant = determinism.ever_entered and determinism.is_batch_invariant()
    return _choose(call, forced, determinism.is_deterministic(), invariant)


def backend_for(call: Call, forced: str | None = None) -> Backend:
    """The backend that `choose` names, after a measurement if this is the first call of its class on this machine."""
    chosen = choose(call, forced)
    if chosen.unmeasured and first_use.measure(call):
        _forget_choices()
        chosen = choose(call, forced)
    return registry.backend(chosen.backend)


def choose_and_describe(call: Call, forced: str | None = None) -> Choice:
    """`choose`, with the backend's description of the kernel that would run."""
    choice = choose(call, forced)
    return choice._replace(kernel=registry.backend(choice.backend).about.describe(call))


_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("peftk_forced", default=None)
_UNFORCED = contextlib.nullcontext()


def forcing(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Forces the backend of all choices inside, so that a forced backend uses no other one for a part of its call."""
    return _UNFORCED if name is None else _forcing(name)


@contextlib.contextmanager
def _forcing(name: str) -> Iterator[None]:
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The name given to the enclosing `forcing`, or None outside of one."""
    return _forced.get()


@remembered
def keeps_to_our_kernels(dtype: torch.dtype, M: int, K: int, N: int) -> bool:
    """Whether it is decided that a forward of this shape runs on our CPU kernels."""
    call = Call(
        op=LORA_LINEAR, device="cpu", x_dtype=dtype, weight_dtype=dtype, adapter_dtype=dtype, M=M, K=K, N=N, rank=1,
        adapters=1,
    )  # fmt: skip
    chosen = _choose(call, None, False, False)
    return chosen.backend == "cpu" and not chosen.unmeasured


@remembered
def direct_limit(device: str, dtype: torch.dtype) -> int:
    """Up to how many multiply-adds (M·K·N) a direct call in `dtype` runs whatever its shape."""
    if device != "cpu":
        return 0
    return SMALL_CALL if measured.may_prefer_gemm(LORA_LINEAR, dtype) else NO_LIMIT


def forget() -> None:
    """Makes the next calls read the measurements again and choose anew."""
    measured.forget_loaded()
    _forget_choices()


def _forget_choices() -> None:
    for cached in _remembered:
        cached.cache_clear()


def unforced(call: Call) -> str:
    """The name of the backend for `call` where none is forced, and deterministic algorithms are not asked for."""
    return _choose(call, None, False, False).backend


@remembered
def _choose(call: Call, forced: str | None, deterministic: bool, invariant: bool) -> Choice:
    invariant = invariant and call.op.kind in ("lora_linear", "adapter_block") and not call.op.backward
    if forced is not None:
        reason = cannot_run(forced, call) or _varies(forced, invariant)
        if reason is not None:
            raise BackendError(f"backend {forced!r} was forced and cannot run {call.op}: {reason}")
        return Choice(forced, "forced by argument or PEFTK_BACKEND", ())
    rejected: list[tuple[str, str]] = []
    order, why, unmeasured = _backend_order(call, deterministic, invariant)
    for name in order:
        reason = cannot_run(name, call) or _varies(name, invariant)
        if reason is None:
            reason = why.get(name, f"the preferred backend on {call.device} that can run this call")
            return Choice(name, reason, tuple(rejected), unmeasured=unmeasured)
        rejected.append((name, reason))
    if invariant:
        reasons = "; ".join(f"{name} {why}" for name, why in rejected)
        raise BackendError(f"{call.op}: no backend can run this call with batch_invariant=True: {reasons}")
    raise BackendError(f"no backend can run {call}: {rejected}")


def _varies(name: str, invariant: bool) -> str | None:
    """Why the backend is out in batch-invariant mode; None if it is not, or without the mode."""
    if not invariant or registry.backend(name).batch_invariant:
        return None
    return "computes a row in ways that depend on the batch, which peftk.deterministic(batch_invariant=True) rules out"


def _backend_order(call: Call, deterministic: bool, invariant: bool) -> tuple[tuple[str, ...], dict[str, str], bool]:
    """The backends to try, in order, reasons for some of them, and `Choice.unmeasured`."""
    if call.op == SEGMENTS:
        return _SEGMENTS_ORDER, {}, False
    order = _ORDER.get(call.device, ("triton", "reference"))
    if invariant:
        reason = "with batch_invariant=True only kernels run whose rows ignore the batch"
        return order, dict.fromkeys(order, reason), False
    if call.device not in _ORDER or call.op.kind != "lora_linear":
        return order, {}, False
    if deterministic:
        verdict = Verdict(
            False, "with torch.use_deterministic_algorithms or peftk.deterministic only our own kernels run"
        )
    elif call.packing is not None:
        verdict = Verdict(False, "a library's product would need a copy of W that is not packed")
    elif call.x_dtype != call.weight_dtype:
        verdict = Verdict(False, "only our kernels multiply mixed dtypes without a copy")
    elif call.device == "cpu" and call.M * call.K * call.N <= SMALL_CALL:
        verdict = Verdict(False, "a small call goes directly to our kernels")
    elif call.device == "cpu" and cannot_run("cpu", call) is not None:
        verdict = Verdict(False, "our kernels cannot run it")
    else:
        verdict = measured.verdict(call)
    order = ("gemm", *order) if verdict.gemm else order
    return order, dict.fromkeys(order, verdict.reason), verdict.unmeasured


def rounds_once(name: str) -> bool:
    """Whether a backend rounds its results to their dtype once; if not, it also rounds the base layer's part."""
    return registry.backend(name).rounds_once


def cannot_run(name: str, call: Call) -> str | None:
    """Why backend `name` cannot run `call`, or None if it can."""
    try:
        backend = registry.backend(name)
    except BackendError as error:
        return str(error)
    if call.packing is not None and call.packing.format not in backend.quantized:
        return f"does not read weights packed as {call.packing.format}"
    return backend.about.cannot_run(call)
