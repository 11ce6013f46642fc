"""Runs `tests/interpreted/interleaving.py` in a process where TRITON_INTERPRET=1 was set before triton is imported."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from .test_lora_linear_triton import interpret


def test_protocols_hold_in_every_interleaving() -> None:
    interpret("not full", "interleaving.py")
