"""The parts of `peftk selftest`: a check, its outcome, and the target that checks run on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """What is tested: cpu, cuda, or interpreter (the checks of cuda on tiny CPU tensors, in Triton's interpreter)."""

    name: str
    device: str
    backends: tuple[str, ...]

    @property
    def is_rehearsal(self) -> bool:
        return self.name == "interpreter"


class WrongError(AssertionError):
    """A check found a wrong result; the message says which."""


class NotRunError(Exception):
    """A check cannot run here; the message says why."""


class Found(NamedTuple):
    """What a check found. error: in multiples of the bound. figures: measurements, as JSON values."""

    error: float
    figures: dict[str, Any] | None = None
    problem: str | None = None


class Check(NamedTuple):
    """One check. run: returns the error in multiples of the bound; raises WrongError, NotRunError, or anything else."""

    section: str
    backend: str
    op: str
    case: str
    run: Callable[[], float | Found]

    def __str__(self) -> str:
        return f"{self.backend} {self.op}, {self.case}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a check. error: in multiples of the bound. problem: why it failed. not_run: why it did not run.

    figures: what it measured, if anything, as JSON values.
    """

    section: str
    backend: str
    op: str
    case: str
    seconds: float = 0.0
    error: float = 0.0
    problem: str | None = None
    not_run: str | None = None
    figures: dict[str, Any] | None = None

    @property
    def failed(self) -> bool:
        return self.problem is not None

    def __str__(self) -> str:
        return f"{self.backend} {self.op}, {self.case}: {self.problem or self.not_run or 'passed'}"


def perform(check: Check) -> Outcome:
    """Runs a check. Whatever it raises becomes its outcome, so the other checks still run."""
    started = time.monotonic()
    error, problem, not_run, figures = 0.0, None, None, None
    try:
        found = check.run()
        error, figures, problem = found if isinstance(found, Found) else Found(found)
        problem = problem or (None if error <= 1.0 else f"error {error:.2f}× the bound")
    except NotRunError as reason:
        not_run = str(reason)
    except torch.cuda.OutOfMemoryError:
        not_run = "not enough memory on this GPU"
    except WrongError as wrong:
        problem = str(wrong)
    except Exception as raised:
        problem = f"{type(raised).__name__}: {raised}"
    return Outcome(*check[:4], time.monotonic() - started, error, problem, not_run, figures)


def gpu_lost(check: Check) -> str | None:
    """Why no more checks can run, if the failed check has made the GPU unusable for this process; else None."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"this process cannot use the GPU since {check}: {str(error).splitlines()[0]}"
    return None


def require_same_bits(what: str, one: Tensor, other: Tensor) -> None:
    """Raises WrongError if any bit differs, even only the sign of a zero."""
    if one.shape != other.shape or one.dtype != other.dtype:
        raise WrongError(f"{what}: {list(one.shape)} {one.dtype} and {list(other.shape)} {other.dtype} differ")
    if not torch.equal(bits(one), bits(other)):
        raise WrongError(f"{what}: bits differ")


def bits(tensor: Tensor) -> Tensor:
    """The bits of a 16- or 32-bit tensor as integers."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
