"""The processor's name: figures without it mean nothing, and what was measured on one says nothing about another."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor as its maker calls it, or its architecture where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
