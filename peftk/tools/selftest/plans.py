"""The ways to launch one Triton call, for checks and timings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

PLANS: dict[str, dict[str, Any]] = {
    "1 launch": {"once": True, "overlap": False},
    "2 launches": {"once": False, "overlap": False},
    "overlapped": {"once": False, "overlap": True},  # the product begins while the shrink runs
    # one block per multiprocessor; each takes one tile after another
    "staying": {"once": True, "overlap": False, "per_processor": 1},
}


def ways(device: str) -> dict[str, dict[str, Any]]:
    """`PLANS`, without those that the GPU cannot do: before sm_90, no launches overlap."""
    from peftk.triton_kernels import config, tuned

    can_overlap = device != "cuda" or config.can_overlap(tuned.target(torch.device(device)))
    return {name: changes for name, changes in PLANS.items() if can_overlap or not changes["overlap"]}


@contextlib.contextmanager
def override_plan(**changes: Any) -> Iterator[None]:
    """Inside, the plans of all calls have these fields; the other fields are as chosen.

    overlap: the others are those of the shipped plans that do, or do not, overlap, since these have tiles of their own.
    """
    from peftk.triton_kernels import config, tuned

    chosen = tuned.lora_linear

    def changed(call: config.CallShape, device: torch.device, target: int | str) -> config.Plan:
        plan = chosen(call, device, target)
        if plan.overlap != changes.get("overlap", plan.overlap):
            plan = config.launched(call, target, overlap=not plan.overlap)
        return plan._replace(**changes)

    records = tuned.derived
    # of its own, and kept with the others until the plans change
    own = records.setdefault((override_plan, frozenset(changes.items())), {})
    tuned.lora_linear, tuned.derived = changed, own
    try:
        yield
    finally:
        tuned.lora_linear, tuned.derived = chosen, records
