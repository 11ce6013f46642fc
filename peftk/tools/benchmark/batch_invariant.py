"""The price of batch-invariant mode: one layer with its adapter in the mode, compared with itself outside of it."""

from __future__ import annotations

import dataclasses

import peftk
from peftk.tools.benchmark import lora_linear
from peftk.tools.benchmark.common import Case, Shape, Side

OP, DEFAULT = "batch_invariant", "peftk's default mode"


def case(shape: Shape, device: str) -> Case:
    """The layer of `lora_linear` in both modes, the default one first."""
    forward = lora_linear.case(shape._replace(op="lora_linear"), device, ())
    (ours,) = (side for side in forward.sides if side.name.startswith("peftk"))
    # the sides take turns, so each run enters the mode: some µs
    run = peftk.deterministic(batch_invariant=True)(ours.run)
    error = peftk.deterministic(batch_invariant=True)(ours.error)
    sides = (dataclasses.replace(ours, name=DEFAULT), Side(ours.name, run, error))
    return dataclasses.replace(forward, shape=shape, sides=sides)
