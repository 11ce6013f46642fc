"""The list of backends. A new one is a file in this folder (see `contract`) and its name here."""

from __future__ import annotations

import functools
import importlib

from peftk.backends.call import BackendError
from peftk.backends.contract import Backend

NAMES = ("reference", "cpu", "gemm", "triton", "cuda")


@functools.cache
def backend(name: str) -> Backend:
    """The backend of this name. Raises ValueError for an unknown name, BackendError if it cannot be imported."""
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    try:
        module = importlib.import_module(f"peftk.backends.{name}")
    except ImportError as error:
        raise BackendError(f"backend {name!r} cannot be imported: {error}") from error
    implementation: Backend = module.backend()
    return implementation
