"""Runs `tests/interpreted/behaviour.py` and `compiled.py` in processes of their own, as TRITON_INTERPRET=1 asks."""

from __future__ import annotations

import pytest

from tests.test_lora_linear_triton import interpret

FILES = ["behaviour", "compiled"]


@pytest.mark.parametrize("stem", FILES)
def test_in_the_interpreter(stem: str) -> None:
    interpret("not full", stem)


@pytest.mark.full
@pytest.mark.parametrize("stem", FILES)
def test_in_the_interpreter_at_length(stem: str) -> None:
    interpret("full", stem)
