"""Stand-ins for a GPU, to test the selftest's own code."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def rerun(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], object]]:
    """Like a captured graph: its replay repeats the calls, into the same tensors."""
    results = run()

    def replay() -> None:
        for result, new in zip(results, run(), strict=True):
            result.copy_(new)

    return results, replay
