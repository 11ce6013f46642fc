"""The processor's name, which measurements are reported with and cached by, and its vendor."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


def cpu_name() -> str:
    """The model name of the processor, or its architecture if the system does not say."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_vendor() -> str:
    """The vendor as x86 processors name it (AuthenticAMD, GenuineIntel), or an empty string."""
    return _cpuinfo("vendor_id")


@functools.cache  # with many cores the file is long, and the system takes ms to write it
def _cpuinfo(name: str) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return ""
