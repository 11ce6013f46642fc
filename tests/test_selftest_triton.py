"""Runs `tests/interpreted/behaviour.py` and `compiled.py` in processes of their own, as TRITON_INTERPRET=1 asks."""

from __future__ import annotations

import pytest

from tests.test_lora_linear_triton import interpret

FILES = ["behaviour.py", "compiled.py"]


@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str) -> None:
    interpret("not full", file)


@pytest.mark.full
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter_at_length(file: str) -> None:
    interpret("full", file)
