"""Runs tests/on_host/segments.py: csrc/cuda/segments.cu, compiled by g++ and executed under the sanitizers, is equal to
the specification; mutants are caught."""

from __future__ import annotations

import pytest

from tests.host_cuda import needs_host_cuda, run

pytestmark = needs_host_cuda
SOURCE = "csrc/cuda/segments.cu"


def test_equal_to_the_specification() -> None:
    run("not full", "segments")


@pytest.mark.full
def test_equal_to_the_specification_at_length() -> None:
    run("full", "segments")
