"""A group of checks: what shares a process, and is lost together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from peftk.tools.selftest.check import Check, Target


class Group(NamedTuple):
    """What shares a process.

    checks: makes them inside of that process, one at a time. limit: for all of it, in seconds; check_limit: between two
    of its lines, from the first one on. Then the process is ended. compiles: whether `prepare` compiles the Triton
    kernels that its checks launch, and no other group launches all of them.
    """

    name: str
    title: str
    checks: Callable[[Target], Iterable[Check]]
    limit: float = 180.0
    check_limit: float = 60.0
    compiles: bool = False
