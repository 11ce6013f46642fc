"""Runs tests/interpreted/serving_shapes.py where Triton interprets."""

from __future__ import annotations

import pytest

from tests.test_lora_linear_triton import interpret


def test_in_the_interpreter() -> None:
    interpret("not full", "serving_shapes")


@pytest.mark.full
def test_in_the_interpreter_at_length() -> None:
    interpret("full", "serving_shapes")
