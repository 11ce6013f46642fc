"""Runs tests/on_host/merge.py: csrc/cuda/merge.cu, compiled by g++ and executed under the sanitizers, has the bits of
the reference; mutants are caught."""

from __future__ import annotations

import pytest

from tests.host_cuda import caught, needs_host_cuda, run

pytestmark = needs_host_cuda
SOURCE = "csrc/cuda/merge.cu"


def test_bits_of_the_reference() -> None:
    run("not full", "merge")


BARRIERS = {
    "no barrier before the chunk is read": (
        "                __syncthreads();\n                for (int r",
        "                for (int r",
    ),
    "no barrier before the chunk is overwritten": (
        "                __syncthreads();\n                rank",
        "                rank",
    ),
}
MUTANTS = {
    "ranks rounded up to a chunk": ("for (int r = 0; r < ranks; ++r)", "for (int r = 0; r < kChunk; ++r)"),
    "flushed denormals": ("S::round(__fadd_rn(widen(w), delta))", "S::round(flush(__fadd_rn(widen(w), delta)))"),
    "the first adapter added to zero": ("adapter == 0 ? share :", "adapter == 0 ? 0.0f + share :"),
    "a chunk that runs into the next adapter": ("int64_t(kChunk), end - rank", "int64_t(kChunk), factors.R - rank"),
    "one rounding fewer": (
        "adapter == 0 ? share : __fadd_rn(d[n][c], share)",
        "adapter == 0 ? share : __fmaf_rn(scaling, chain[n][c], d[n][c])",
    ),
}
FLUSH = "inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f * x : x; }"


@pytest.mark.parametrize("mutant", BARRIERS)
def test_a_missing_barrier_gives_wrong_bits(mutant: str) -> None:
    assert caught(SOURCE, [BARRIERS[mutant]], "merge") == "wrong"


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_give_wrong_bits(mutant: str) -> None:
    changes = [MUTANTS[mutant], ("namespace {\n", f"namespace {{\n{FLUSH}\n")]
    assert caught(SOURCE, changes, "merge") == "wrong"


@pytest.mark.full
def test_an_access_outside_is_reported() -> None:
    report = caught(SOURCE, [("c < valid) to[c]", "c <= valid) to[c]")], "merge")
    assert report is not None
    assert "AddressSanitizer" in report or "runtime error" in report


@pytest.mark.full
def test_a_barrier_in_a_branch_is_reported() -> None:
    before = "                __syncthreads();\n                rank"
    report = caught(SOURCE, [(before, before.replace("__sync", "if (thread % 32) __sync"))], "merge")
    assert report is not None
    assert "cuda_on_host: ERROR: __syncthreads" in report or "wait at" in report
