"""The peak of the memory that a run allocates, exactly: torch's CPU allocator tells the profiler of every allocation.

Counted is what torch allocates beyond what it held before the run: activations saved for the backward, gradients,
results and what the operators need in between. Scratch memory inside of a kernel (oneDNN's, MKL's, peftk's own) is not.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch._C._autograd import DeviceType

from peftk.system.timing import Run
from peftk.tools.benchmark.common import Case, Record, record_of


class Peaks(NamedTuple):
    records: list[Record]
    bytes: dict[str, int]  # by side


def measure(case: Case) -> Peaks:
    """The peak of each side that is right. Its check has run it once, so its optimizer has its state."""
    errors = {side.name: side.error() for side in case.sides}
    for side in case.sides:
        side.reset()
    peaks = {side.name: peak_bytes(side.run) for side in case.sides if errors[side.name] <= 1.0}
    return Peaks([record_of(case, "cpu", side.name, errors, {}) for side in case.sides], peaks)


def peak_bytes(run: Run) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the profiler's first use: it is silent then
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        run()
    assert profiler.kineto_results is not None
    held = peak = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak
