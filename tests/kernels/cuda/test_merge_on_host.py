"""csrc/cuda/merge.cu on the host: tests/cuda_emulator/merge_races.cpp finds no race in it; mutants are caught.

test_on_host.py compares it with the reference.
"""

from __future__ import annotations

import re

import pytest

from tests.support.host_cuda import mutant_failure, needs_host_cuda, race, with_changes
from tests.support.tiers import spread

pytestmark = needs_host_cuda
MERGE, TILE = "csrc/cuda/merge.cu", "csrc/cuda/merge_tile.cuh"


# A mutant is compiled only for fp32 and bf16 weights with fp32 adapters, which is enough for these tests.
FEWER = (
    (MERGE, "        case Dtype::kFloat16: return call(__half{});\n", ""),
    (
        MERGE,
        "return with_type(list.adapter_dtype, [&](auto adapter) { return call(weight, adapter); });",
        "return call(weight, float{});",
    ),
)
TESTS = (
    "torch.float32-torch.float32 or torch.bfloat16-torch.float32 or minus_zero or room or "
    "(finite and (float32 or bfloat16)) or (checksum and bfloat16)"
)
Change = tuple[str, str, str]  # path, text, replacement


def changed_sources(*changes: Change) -> dict[str, str]:
    """The sources with these changes and FEWER."""
    of: dict[str, list[tuple[str, str]]] = {}
    for path, before, after in (*changes, *FEWER):
        of.setdefault(path, []).append((before, after))
    return {path: with_changes(path, *some) for path, some in of.items()}


def failure_of(*changes: Change) -> str | None:
    """How these tests fail with a mutant, or None."""
    return mutant_failure(changed_sources(*changes), "merge", "-k", TESTS)


BEFORE_READ = "            __syncthreads();\n            for (int r = 0"
BEFORE_OVERWRITTEN = "            __syncthreads();\n            rank +="
ADD_SHARE = "__fadd_rn(d[n][c], __fmul_rn(scaling, chain[n][c]))"
BISECT = "(table[middle].*kFirst > item ? high : low) = middle;"
WRONG: dict[str, Change] = {
    "no barrier before the chunk is read": (TILE, BEFORE_READ, "            for (int r = 0"),
    "no barrier before the chunk is overwritten": (TILE, BEFORE_OVERWRITTEN, "            rank +="),
    "no barrier before the layer is read": (TILE, "    __syncthreads();\n    const MergeLayer", "    const MergeLayer"),
    "no barrier before the tile is judged": (MERGE, "    __syncthreads();\n    if (shared.ref", "    if (shared.ref"),
    "no barrier before the slot is read": (MERGE, "        __syncthreads();\n        if (sh", "        if (sh"),
    "ranks rounded up to a chunk": (TILE, "for (int r = 0; r < ranks; ++r)", "for (int r = 0; r < kChunk; ++r)"),
    "a chunk that runs into the next adapter": (TILE, "min(kChunk, end - rank)", "min(kChunk, int(layer.R) - rank)"),
    "the first adapter added to zero": (TILE, "d[n][c] = -0.0f", "d[n][c] = 0.0f"),
    "one rounding fewer": (TILE, ADD_SHARE, "__fmaf_rn(scaling, chain[n][c], d[n][c])"),
    "flushed denormals": (
        MERGE,
        "S::round(__fadd_rn(widen(before), d[n][c]))",
        "S::round(std::fabs(widen(before) + d[n][c]) < 0x1p-126f ? 0.0f : widen(before) + d[n][c])",
    ),
    "bisection goes one too far": (TILE, BISECT, BISECT.replace("> item", ">= item")),
    "bisection ends too soon": (TILE, "while (high - low > 1)", "while (high - low > 2)"),
    "tiles counted down first": (TILE, "index / across * T::kDown", "index % across * T::kDown"),
    "a raw slot too far": (MERGE, "slot += shared.first_slot;", "slot += shared.first_slot + 1;"),
    "room for one more": (MERGE, "> notes.room - shared.raw)", "> notes.room - shared.raw + 1)"),
    "a key within its layer": (MERGE, "layer.first_weight + (place.row", "(place.row"),
    "the value that is merged": (MERGE, "= weight[n * layer.stride + c]", "= w[n].lane[c]"),
    "nothing is refused": (MERGE, "    if (!finite) atomicOr(&shared.refused, 1);\n", ""),
    "infinity is finite": (MERGE, "< S::kInfinity", "<= S::kInfinity"),
    "another layer is refused": (MERGE, "notes.refused + shared.number", "notes.refused"),
    "code from W to W″": (
        MERGE,
        "encode<uint32_t, S::kMagnitude>(S::bits(before), S::bits(back))",
        "encode<uint32_t, S::kMagnitude>(S::bits(back), S::bits(before))",
    ),
    "merged tiles are not noted": (MERGE, "    if (threadIdx.x == 0) notes.merged[tile] = 1;\n", ""),
    "merged tiles are merged again": (MERGE, "const bool done = notes.merged[tile];", "const bool done = false;"),
    "all tiles are unmerged": (MERGE, "const bool done = !merged[tile];", "const bool done = false;"),
    "row sums are not added up": (TILE, "atomicAdd(sums + row, share[0])", "sums[row] = share[0]"),
    "halves of rows mixed up": (TILE, "upper ? share[n] : share[n + half]", "upper ? share[n + half] : share[n]"),
    "a lane's row forgotten": (TILE, "row += upper ? half : 0;", ""),
    "multipliers of 32 bits": (TILE, "int32_t(int16_t(odd))", "int32_t(odd)"),
    "raw weights without a stride": (MERGE, "within / layer.K * layer.stride", "within / layer.K * layer.K"),
}
REPORTED: dict[str, tuple[Change, str]] = {
    "a column too far": (
        (TILE, "c < place.columns) to[n * stride + c]", "c <= place.columns) to[n * stride + c]"),
        "AddressSanitizer|runtime error",
    ),
    "a row too far": ((TILE, "n < rows ? widen(B", "n <= rows ? widen(B"), "AddressSanitizer"),
    "wide accesses anywhere": (
        (TILE, "layer.aligned && place.columns == T::kColumns", "place.columns == T::kColumns"),
        "runtime error",
    ),
    "a barrier in a branch": (
        (TILE, BEFORE_OVERWRITTEN, BEFORE_OVERWRITTEN.replace("__sync", "if (threadIdx.x % 32) __sync")),
        "__syncthreads|wait at",
    ),
}

BARRIERS = [name for name in WRONG if name.startswith("no barrier")]


@pytest.mark.parametrize("mutant", spread([name for name in WRONG if name not in BARRIERS], default=0, full=5))
def test_mutants_are_caught(mutant: str) -> None:
    assert failure_of(WRONG[mutant]) is not None


@pytest.mark.parametrize("mutant", spread(REPORTED, default=0, full=1))
def test_mutants_are_reported(mutant: str) -> None:
    change, expected = REPORTED[mutant]
    assert re.search(expected, failure_of(change) or "")


@pytest.mark.full
def test_unchanged_sources_pass() -> None:
    assert failure_of() is None


@pytest.mark.full
def test_no_races() -> None:
    assert race("merge", changed_sources()) is None


@pytest.mark.parametrize("mutant", spread([*BARRIERS, "row sums are not added up"], default=0, full=3))
def test_races_are_caught(mutant: str) -> None:
    assert race("merge", changed_sources(WRONG[mutant])) is not None


@pytest.mark.parametrize("mutant", spread(BARRIERS, default=0, full=1))
def test_a_missing_barrier_gives_wrong_bits_too(mutant: str) -> None:
    assert failure_of(WRONG[mutant]) is not None
