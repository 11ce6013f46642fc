"""A group of checks: what shares a process, and is lost together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from peftk.tools.selftest.check import Check, Target


class Group(NamedTuple):
    """checks: makes them inside of the group's process, one at a time. seconds: estimated, on an H200, with compiled
    kernels in Triton's cache, and without. limit: in seconds; then the process is ended.
    """

    name: str
    title: str
    checks: Callable[[Target], Iterable[Check]]
    seconds: tuple[int, int] = (0, 0)
    limit: float = 180.0
