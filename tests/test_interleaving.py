"""Runs `tests/interpreted/interleaving*.py` in a process where TRITON_INTERPRET=1 was set before triton is imported."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.test_lora_linear_triton import interpret

STEMS = ("interleaving", "interleaving_lora_linear", "interleaving_lora_wgrad")


def test_protocols_hold_in_every_interleaving() -> None:
    interpret("not full", *STEMS)


@pytest.mark.full
def test_protocols_hold_in_many_more() -> None:
    interpret("full", *STEMS)
