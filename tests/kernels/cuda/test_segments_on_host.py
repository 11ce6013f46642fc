"""csrc/cuda/segments.cu on the host: tests/cuda_emulator/segments_races.cpp finds no race in it; mutants are caught.

test_on_host.py compares it with the specification.
"""

from __future__ import annotations

import itertools

import pytest

from tests.support.host_cuda import mutant_failure, needs_host_cuda, race, with_changes
from tests.support.tiers import spread

pytestmark = needs_host_cuda
SOURCE = "csrc/cuda/segments.cu"


# Numbers of rows and adapters: each kernel, with blocks that share the ends, and with several tiles.
SHAPES = ((1, 3), (64, 300), (200, 3), (1000, 3), (2100, 20))


def race_in(*changes: tuple[str, str], shapes: tuple[tuple[int, int], ...] = SHAPES) -> str | None:
    """How the source, or a mutant of it, fails under the race detector, or None."""
    return race("segments", {SOURCE: with_changes(SOURCE, *changes)}, *itertools.chain(*shapes))


def test_no_races() -> None:
    assert race_in() is None


@pytest.mark.full
def test_no_races_at_length() -> None:
    """Segments numbered in two chunks: a scan with many threads, for which the detector is slow."""
    assert race_in(shapes=((1000, 300), (5000, 40), (1030, 1030))) is None


BARRIER = "__syncthreads();\n"
EXCHANGED = """                __syncthreads();
#pragma unroll
                for (int j = 0; j < kKeys; ++j) other[j] = exchange"""
SORTED = """shared.sorted[slot(thread * kKeys + j)] = key[j];
    }
    __syncthreads();
"""
COUNTED = """totals[warp] = count;
    __syncthreads();
"""
SUMMED = """shared.total[strip][lane] = total;
    __syncthreads();
"""
NUMBERED = """= found + upto[i];
        __syncthreads();
"""
# Noticed by the race detector; the results may be right.
RACES = {
    "no barrier after the keys are exchanged": (EXCHANGED, EXCHANGED.replace(BARRIER, "\n")),
    "one buffer for all exchanges": ("buffer ^= 1;", ""),
    "no barrier after the sort": (SORTED, SORTED.replace(BARRIER, "\n")),
    "no barrier after a warp has counted": (COUNTED, COUNTED.replace(BARRIER, "\n")),
    "no barrier after a strip is summed": (SUMMED, SUMMED.replace(BARRIER, "\n")),
    "no barrier after the segments are numbered": (NUMBERED, NUMBERED.replace(BARRIER, "\n")),
    "tiles that fill each other's share": ("max(found, first + 1), first + kTile)", "found, first + kTile)"),
    "every block writes the rows": (
        "store_counts<kSize>(shared.sorted, args.ends, int(args.adapters));\n    if (blockIdx.y > 0) return;",
        "store_counts<kSize>(shared.sorted, args.ends, int(args.adapters));",
    ),
}
REPORTED = {
    "a row too many": ("if (row < args.M) {", "if (row <= args.M) {"),
    "a workspace that is too small": ("(kTile + adapters + 1);", "(kTile + adapters);"),
    "the place before the first": ("place < M && (place == 0 ||", "place < M && ("),
    "a chunk of groups too wide": ("group[i] - chunk < kTile)", "group[i] - chunk <= kTile)"),
    "a barrier that not all reach": (SORTED, SORTED.replace("    }\n    " + BARRIER, "    " + BARRIER + "    }\n")),
}
WRONG = {
    "rows of one adapter in reverse": (
        ("key[j] = group * kTile + at;", "key[j] = group * kTile + kTile - 1 - at;"),
        ("key % kTile, key / kTile,", "kTile - 1 - key % kTile, key / kTile,"),
    ),
    "an id that is no adapter's": (("id >= 0 && id < args.adapters", "id >= 0 && id <= args.adapters"),),
    "negative ids": (("id >= 0 && id < args.adapters", "id >= -2 && id < args.adapters"),),
    "ids narrowed before they are compared": (("const Id id = static_cast", "const int id = static_cast"),),
    "a stride left out": (("[row * args.stride]", "[row]"),),
    "a wrong distance of a shuffle": (("key[j], distance);", "key[j], distance ^ 3);"),),
    "a wrong partner in another warp": (("(thread ^ distance)];", "(thread ^ 32)];"),),
    "all runs ascending": (("const bool ascending = (place & run) == 0;", "const bool ascending = true;"),),
    "the last strides left out": (
        ("merge_own(key, place, run, kKeys / 2);", "merge_own(key, place, run, kKeys / 4);"),
    ),
    "a search without its last step": (("step > 0; step /= 2)", "step > 1; step /= 2)"),),
    "a search for a key too high": (("(g + 1) * kTile);", "(g + 1) * kTile + 1);"),),
    "a search that ends a key early": ((" + (sorted[slot(count)] < limit)", ""),),
    "counts of the group below": (("(g + 1) * kTile);", "g * kTile + 1);"),),
    "flags up to the place before": (("(2u << lane) - 1", "(1u << lane) - 1"),),
    "a warp's own flags twice": (("w < warp ? totals", "w <= warp ? totals"),),
    "a block that starts at any multiple of 32": (("place % kRowsPerEntry == 0", "place % 32 == 0"),),
    "nothing beyond the last segment": (("store_beyond(args, found, M);", ""),),
    "a strip's own sum twice": (("s < strip; ++s", "s <= strip; ++s"),),
    "strips that leave out the last tile": (("count(ceil_div(args.M, kTile))", "count(args.M / kTile)"),),
    "rows of the tile alone": (("row[i] = first + key % kTile;", "row[i] = key % kTile;"),),
    "lower groups of this tile counted twice": (("- (lower ? mine[group[i] - 1] : 0)", ""),),
    "earlier tiles forgotten": (("(tile > 0 && at < rows ? before[group[i]] : 0)", "0"),),
    "segments numbered anew in each chunk": (("found += here;", "found = here;"),),
}


@pytest.mark.parametrize("mutant", spread(RACES, default=1, full=2))
def test_races_are_caught(mutant: str) -> None:
    assert race_in(RACES[mutant]) is not None


@pytest.mark.parametrize("mutant", spread(REPORTED, default=0, full=1))
def test_accesses_outside_and_lost_threads_are_reported(mutant: str) -> None:
    assert mutant_failure({SOURCE: with_changes(SOURCE, REPORTED[mutant])}, "segments") not in (None, "wrong")


@pytest.mark.parametrize("mutant", spread(WRONG, default=0, full=5))
def test_mutants_are_caught(mutant: str) -> None:
    assert mutant_failure({SOURCE: with_changes(SOURCE, *WRONG[mutant])}, "segments") is not None
