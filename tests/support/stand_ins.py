"""What stands in for a GPU where the selftest's own code is tested."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def rerun(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], object]]:
    """What a captured graph does: the same calls again, into the same tensors."""
    results = run()

    def replay() -> None:
        for result, new in zip(results, run(), strict=True):
            result.copy_(new)

    return results, replay
