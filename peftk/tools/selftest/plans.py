"""The ways to launch one Triton call, for checks and timings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

PLANS: dict[str, dict[str, Any]] = {
    "1 launch": {"once": True},
    "2 launches": {"once": False},
    "staying": {"once": True, "per_processor": 1},  # one block per multiprocessor; each takes one tile after another
}


@contextlib.contextmanager
def override_plan(**changes: Any) -> Iterator[None]:
    """Inside, the plans of all calls have these fields; the other fields are as chosen."""
    from peftk.triton_kernels import tuned

    chosen = tuned.lora_linear
    tuned.lora_linear = lambda *call: chosen(*call)._replace(**changes)
    try:
        yield
    finally:
        tuned.lora_linear = chosen
