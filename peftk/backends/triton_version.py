"""Refuses a Triton that is too old for the kernels, in words, before one of them fails over it."""

from __future__ import annotations

import re

import triton

OLDEST = (3, 6)


def problem(version: str) -> str | None:
    """What is wrong with a version of Triton; None for 3.6 and later."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and (int(found[1]), int(found[2])) >= OLDEST:
        return None
    return f"needs Triton {OLDEST[0]}.{OLDEST[1]} or later, got {version}"


why_not = problem(triton.__version__)
if why_not is not None:
    raise ImportError(why_not)
