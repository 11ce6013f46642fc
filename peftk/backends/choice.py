"""The one place that decides which backend runs. What a backend is: `peftk.backends.contract`.

`reference` (plain torch, any device) · `cpu` (C++ SIMD) · `gemm` (torch's matrix product, our adapters on top) ·
`triton` (GPUs; CPU tensors under TRITON_INTERPRET=1) · `cuda` (CUDA C++, where it wins). `choose` is a pure function of
the call, of what `peftk tune` has measured on this machine (`peftk.backends.measured`), and of torch's switch for
deterministic algorithms, which keeps to our own kernels; `explained` says what it chose and why.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator

import torch

from peftk.backends import measured, registry
from peftk.backends.call import LORA_LINEAR, SEGMENTS, BackendError, Call, Choice
from peftk.backends.contract import Backend

# First that can run wins. The reference can run everything, so a choice always exists.
_PREFERENCE = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
# On any device: only kernels of these two walk sorted rows.
_PREFERENCE_FOR_SEGMENTS = ("cuda", "triton", "reference")


# Calls of up to so many multiply-adds (M·N·K) on a CPU are about overhead: no measurement is asked, `cpu` serves them.
SMALL = 1 << 22


def choose(call: Call, forced: str | None = None) -> Choice:
    """The backend that serves `call`. `forced` (else PEFTK_BACKEND) names one; it serves or BackendError is raised.

    Within `forcing` that is what `forced` is where it is not given.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _choose(call, forced or _forced.get() or os.environ.get("PEFTK_BACKEND") or None, deterministic)


def serving(call: Call, forced: str | None = None) -> Backend:
    """The backend that `choose` names."""
    return registry.backend(choose(call, forced).backend)


def explained(call: Call, forced: str | None = None) -> Choice:
    """`choose`, with what the backend says of the kernel that would run."""
    choice = choose(call, forced)
    return choice._replace(kernel=registry.backend(choice.backend).about.describe(call))


_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("peftk_forced", default=None)
_UNFORCED = contextlib.nullcontext()


def forcing(name: str | None) -> contextlib.AbstractContextManager[None]:
    """While a forced backend serves a call, what it chooses in turn is forced too: it uses no other one."""
    return _UNFORCED if name is None else _forcing(name)


@contextlib.contextmanager
def _forcing(name: str) -> Iterator[None]:
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The name that `forcing` was given, or None outside of it."""
    return _forced.get()


@functools.cache
def direct_up_to(dtype: torch.dtype) -> int:
    """Up to how many multiply-adds (M·K·N) a forward in `dtype` on a CPU is `cpu`'s whatever its shape."""
    return SMALL if measured.may_prefer_gemm(LORA_LINEAR, dtype) else 1 << 62


def forget() -> None:
    """Chooses anew from here on: something was measured."""
    measured.forget_loaded()
    _choose.cache_clear()
    direct_up_to.cache_clear()


@functools.lru_cache(maxsize=4096)
def _choose(call: Call, forced: str | None, deterministic: bool) -> Choice:
    if forced is not None:
        reason = cannot_run(forced, call)
        if reason is not None:
            raise BackendError(f"backend {forced!r} was forced and cannot run {call.op}: {reason}")
        return Choice(forced, "forced by argument or PEFTK_BACKEND", ())
    rejected: list[tuple[str, str]] = []
    order, why = _preference(call, deterministic)
    for name in order:
        reason = cannot_run(name, call)
        if reason is None:
            return Choice(
                name, why.get(name, f"first in preference on {call.device} that runs this call"), tuple(rejected)
            )
        rejected.append((name, reason))
    raise BackendError(f"no backend serves {call}: {rejected}")


def _preference(call: Call, deterministic: bool) -> tuple[tuple[str, ...], dict[str, str]]:
    """The backends to ask, in order, and reasons for some of them."""
    if call.op == SEGMENTS:
        return _PREFERENCE_FOR_SEGMENTS, {}
    if call.device != "cpu" or call.op.kind != "lora_linear":
        return _PREFERENCE.get(call.device, ("triton", "reference")), {}
    if deterministic:
        return _PREFERENCE["cpu"], {"cpu": "torch.use_deterministic_algorithms keeps to our own kernels"}
    if call.x_dtype != call.weight_dtype:
        return _PREFERENCE["cpu"], {"cpu": "of mixed dtypes only our kernels make a product without a copy"}
    if call.M * call.K * call.N <= SMALL:
        return _PREFERENCE["cpu"], {"cpu": "a small call goes straight to our kernels"}
    gemm, reason = measured.verdict(call)
    return (("gemm", *_PREFERENCE["cpu"]) if gemm else _PREFERENCE["cpu"]), {"gemm" if gemm else "cpu": reason}


def rounds_once(name: str) -> bool:
    """Whether a backend's results are rounded to their dtype once; if not, also the base layer's part of them."""
    return registry.backend(name).rounds_once


def cannot_run(name: str, call: Call) -> str | None:
    """Why backend `name` cannot run `call`, or None where it can."""
    try:
        backend = registry.backend(name)
    except BackendError as error:
        return str(error)
    return backend.about.cannot_run(call)
