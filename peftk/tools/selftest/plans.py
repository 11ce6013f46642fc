"""The ways to launch one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

PLANS: dict[str, dict[str, Any]] = {
    "1 launch": {"once": True},
    "2 launches": {"once": False},
    "staying": {"once": True, "per_processor": 1},  # as many blocks as processors, which draw tile after tile
}


@contextlib.contextmanager
def planned(**changes: Any) -> Iterator[None]:
    """Calls are launched as chosen, but for these fields of the plan."""
    from peftk.triton_kernels import tuned

    chosen = tuned.lora_linear
    tuned.lora_linear = lambda *call: chosen(*call)._replace(**changes)
    try:
        yield
    finally:
        tuned.lora_linear = chosen
