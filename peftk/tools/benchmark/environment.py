"""The environment of a measurement: versions, processor, threads, and the backends in use."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from typing import Any

import torch

import peftk
from peftk.system.processor import cpu_name

_PACKAGES = ("numpy", "peft", "torch", "transformers", "triton")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, processor, threads and which backend runs on the device, as plain JSON values.

    Raises BackendError if PEFTK_BACKEND names a backend that cannot run on the device.
    """
    backends = {
        op: {"backend": choice.backend, "kernel": choice.kernel}
        for op in ("lora_linear", "multi_lora_linear", "merge")
        for choice in (peftk.explain(op, dtype=torch.bfloat16, device=device),)
    }
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "peftk": peftk.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "serving": backends,
    }


def busy(env: dict[str, Any]) -> str | None:
    """A warning if other programs use the same cores, which slows libraries by very different amounts; else None."""
    load, cores = env["load"], env["cores"]
    if load is None or load <= 1.25 * cores:
        return None
    return f"This machine is busy (load {load:g} on {cores} cores): timings and ratios are unreliable."


def version(package: str) -> str | None:
    """The installed version, or None if the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
