"""Runs `tests/interpreted/merge.py` in a process where TRITON_INTERPRET=1 was set before triton is imported."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.test_lora_linear_triton import interpret


def test_bits_in_the_interpreter() -> None:
    interpret("not full", "merge")


@pytest.mark.full
def test_bits_in_the_interpreter_at_length() -> None:
    interpret("full", "merge")
