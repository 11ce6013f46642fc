"""How the CPU kernels cut the product: the table of `csrc/cpu/blocking.cpp`, or what `peftk tune` found here.

No blocking changes a bit of a result. What was found is kept in blocking.json (`peftk.system.cache`) by processor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from peftk import _cpu
from peftk.backends import made_on
from peftk.system import cache

_FILE = "blocking.json"


class Blocking(NamedTuple):
    """rows: of x a pass over W. l2_rows: of packed x in L2. steps: of the contraction packed at a time. blocks: a task.

    `csrc/cpu/blocking.h` has their limits.
    """

    rows: int
    l2_rows: int
    steps: int
    blocks: int


SHIPPED = Blocking(*_cpu.blocking())


def in_use() -> Blocking:
    return Blocking(*_cpu.blocking())


def use(blocking: Blocking) -> None:
    """For the whole process. Raises ValueError for values outside the kernels' limits."""
    _cpu.use_blocking(**blocking._asdict())


def use_found() -> None:
    """Uses what `peftk tune` found on this machine, or else the shipped one."""
    found, _ = cache.load(_FILE, made_on.machine("cpu"), made_on.versions("cpu"), _parse, verb="found", unit="machine")
    use(found or SHIPPED)


def save(found: Blocking) -> None:
    """Keeps it for later processes. Raises OSError if the cache cannot be written."""
    cache.save(_FILE, made_on.machine("cpu"), made_on.versions("cpu"), {"blocking": found._asdict()})


def delete() -> bool:
    """Deletes what was found on this machine, and goes back to the shipped one. Returns whether there was any."""
    existed = cache.delete(_FILE, made_on.machine("cpu"))
    use(SHIPPED)
    return existed


def _parse(entry: dict[str, Any]) -> Blocking:
    before, found = in_use(), Blocking(**entry["blocking"])
    use(found)  # checks it
    use(before)
    return found
