"""Runs `tests/interpreted/lora_wgrad.py` in a process where TRITON_INTERPRET=1 was set before triton is imported."""

from __future__ import annotations

import pytest

from tests.test_lora_linear_triton import interpret


def test_gradients_in_the_interpreter() -> None:
    interpret("not full", "lora_wgrad")


@pytest.mark.full
def test_gradients_in_the_interpreter_at_length() -> None:
    interpret("full", "lora_wgrad")
