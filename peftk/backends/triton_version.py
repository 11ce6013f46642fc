"""Refuses a Triton that is too old for the kernels, in words, before one of them fails over it."""

from __future__ import annotations

import os
import re

import numpy as np
import triton

OLDEST = (3, 6)


def problem(version: str, interpreter_numpy: str | None = None) -> str | None:
    """What is wrong with a version of Triton; None for 3.6 and later.

    interpreter_numpy: the version of NumPy, if Triton interprets. Triton 3.6's interpreter makes ints of arrays with
    one element, which NumPy refuses from 2.4 on.
    """
    found = _parts(version)
    if found < OLDEST:
        return f"needs Triton {OLDEST[0]}.{OLDEST[1]} or later, got {version}"
    if interpreter_numpy is not None and found < (3, 7) and _parts(interpreter_numpy) >= (2, 4):
        return f"the interpreter of Triton {version} needs NumPy before 2.4, got {interpreter_numpy}"
    return None


def _parts(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found is not None else (0, 0)


why_not = problem(triton.__version__, np.__version__ if os.environ.get("TRITON_INTERPRET") == "1" else None)
if why_not is not None:
    raise ImportError(why_not)
