"""Runs `tests/interpreted/segments.py` in a process where TRITON_INTERPRET=1 was set before triton is imported."""

from __future__ import annotations

import pytest

from tests.test_lora_linear_triton import interpret


def test_parity_in_the_interpreter() -> None:
    interpret("not full", "segments")


@pytest.mark.full
def test_parity_in_the_interpreter_at_length() -> None:
    interpret("full", "segments")
