"""A check, its outcome, and where checks run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """cpu, cuda, or the rehearsal of cuda: CPU tensors through Triton's interpreter, on tiny shapes."""

    name: str
    device: str
    backends: tuple[str, ...]

    @property
    def rehearses(self) -> bool:
        return self.name == "interpreter"


class WrongError(AssertionError):
    """What a check found."""


class NotRunError(Exception):
    """Why a check cannot be made here."""


class Check(NamedTuple):
    """One question. run: the error as a multiple of what is allowed; raises WrongError, NotRunError, or anything."""

    section: str
    backend: str
    op: str
    case: str
    run: Callable[[], float]

    def __str__(self) -> str:
        return f"{self.backend} {self.op}, {self.case}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    section: str
    backend: str
    op: str
    case: str
    seconds: float = 0.0
    error: float = 0.0
    problem: str | None = None
    not_run: str | None = None

    @property
    def failed(self) -> bool:
        return self.problem is not None

    def __str__(self) -> str:
        return f"{self.backend} {self.op}, {self.case}: {self.problem or self.not_run or 'passed'}"


def perform(check: Check) -> Outcome:
    """Whatever a check raises is its outcome: the others go on."""
    started = time.monotonic()
    error, problem, not_run = 0.0, None, None
    try:
        error = check.run()
        problem = None if error <= 1.0 else f"error {error:.2f}× allowed"
    except NotRunError as reason:
        not_run = str(reason)
    except torch.cuda.OutOfMemoryError:
        not_run = "not enough memory on this GPU"
    except WrongError as wrong:
        problem = str(wrong)
    except Exception as raised:
        problem = f"{type(raised).__name__}: {raised}"
    return Outcome(*check[:4], time.monotonic() - started, error, problem, not_run)


def same_bits(what: str, one: Tensor, other: Tensor) -> None:
    """Raises WrongError where they differ, be it in the sign of a zero."""
    if one.shape != other.shape or one.dtype != other.dtype:
        raise WrongError(f"{what}: {list(one.shape)} {one.dtype} and {list(other.shape)} {other.dtype}")
    integer = {2: torch.int16, 4: torch.int32}[one.element_size()]
    if not torch.equal(one.contiguous().view(integer), other.contiguous().view(integer)):
        raise WrongError(f"{what}: bits differ")
