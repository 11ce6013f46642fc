"""What sides that answer in another process have in common."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence


def processor_of(pid: int) -> float:
    """The processor time in seconds, of all threads, that a process has used so far; NaN where /proc does not tell."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            after_name = file.read().rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime


def last_line(said: Sequence[str]) -> str:
    """What a process said before it ended."""
    return next((line.strip() for line in reversed(said) if line.strip()), "it has said nothing")
