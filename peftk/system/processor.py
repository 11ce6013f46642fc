"""The processor's name, which measurements are reported with and cached by."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """The model name of the processor, or its architecture if the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
