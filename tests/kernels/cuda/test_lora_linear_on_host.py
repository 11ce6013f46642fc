"""csrc/cuda/lora_linear.cu on the host: tests/cuda_emulator/lora_linear_races.cpp compares it with sums in fp64, under
the race detector, and for each of many mutants.

test_on_host.py compares it with the fp64 reference through the Python API.
"""

from __future__ import annotations

import subprocess

import pytest

from tests.support.host_cuda import FEWER_FORMS, REPORT, mutant_failure, needs_host_cuda, run_driver, with_changes
from tests.support.tiers import spread

pytestmark = needs_host_cuda

SOURCE = "csrc/cuda/lora_linear.cu"


def drive(
    sanitizer: str, cases: int, path: str = SOURCE, *changes: tuple[str, str]
) -> subprocess.CompletedProcess[str]:
    mutants = {SOURCE: with_changes(SOURCE, *FEWER_FORMS)}
    if path == SOURCE:
        mutants[SOURCE] = with_changes(SOURCE, *FEWER_FORMS, *changes)
    else:
        mutants[path] = with_changes(path, *changes)
    return run_driver("lora_linear", sanitizer, mutants, cases)


@pytest.mark.full
@pytest.mark.parametrize(("sanitizer", "cases"), [("address", 1000), ("thread", 30)])
def test_no_races_and_right_sums(sanitizer: str, cases: int) -> None:
    done = drive(sanitizer, cases)
    assert done.returncode == 0, done.stdout + done.stderr


TICKETS, ROWS, TERMS, SHRINK, EXPAND = (
    f"csrc/cuda/{stem}.cuh" for stem in ("tickets", "rows", "terms", "shrink", "expand")
)
RACE, HANG = "data race", "a hang"

# Mutants: file, text, replacement, and how it fails if only one sanitizer can see it.
MUTANTS: dict[str, tuple[str, str, str] | tuple[str, str, str, str]] = {
    # the protocol
    "z published before all threads have stored it": (
        TICKETS, "publish(int* counters) {\n    __syncthreads();\n", "publish(int* counters) {\n", RACE),
    "z published without release": (
        TICKETS, "add_release(counters + kPublished", "add_relaxed(counters + kPublished", RACE),
    "z awaited without acquire": (
        TICKETS, "load_acquire(counters + kPublished)",
        "add_relaxed(const_cast<int*>(counters) + kPublished, 0)", RACE),
    "z not awaited": (TICKETS, "kPublished) < tiles", "kPublished) < 0"),
    "a tile too few awaited": (TICKETS, "kPublished) < tiles", "kPublished) < tiles - 1"),
    "z awaited by one thread only": (
        TICKETS, "kPublished) < tiles) {\n        }\n    __syncthreads();", "kPublished) < tiles) {\n        }", RACE),
    "a part counted before all threads have stored it": (
        TICKETS, "int& to_all) {\n    __syncthreads();\n", "int& to_all) {\n", RACE),
    "a part counted without release": (TICKETS, "add_acq_rel(arrivals", "add_relaxed(arrivals", RACE),
    "a part counted without acquire": (TICKETS, "add_acq_rel(arrivals", "add_release(arrivals", RACE),
    "the last to arrive known to one thread only": (
        TICKETS, "*arrivals = 0;\n    }\n    __syncthreads();", "*arrivals = 0;\n    }", RACE),
    "arrivals left": (TICKETS, "if (to_all == splits - 1) *arrivals = 0;", "", "a counter is left"),
    "counted out without order": (TICKETS, "add_acq_rel(counters + kLeft", "add_relaxed(counters + kLeft", RACE),
    "the first one out resets": (TICKETS, "== int(gridDim.x) - 1)", "== 0)"),
    "nobody resets": (TICKETS, "== int(gridDim.x) - 1)", "== int(gridDim.x))", "a counter is left"),
    "block id for ticket": (TICKETS, "to_all = add_relaxed(counters + kDrawn, 1)", "to_all = blockIdx.x", HANG),
    "ticket known to one thread only": (
        TICKETS, "add_relaxed(counters + kDrawn, 1);\n    __syncthreads();",
        "add_relaxed(counters + kDrawn, 1);"),
    "shrink's arrivals for expand's": (EXPAND, "kArrivals + plan.z_tiles + whole", "kArrivals + whole"),
    "one counter for all shrink tiles": (SHRINK, "tickets::kArrivals + whole", "tickets::kArrivals"),
    # rows
    "two rows to one place": (ROWS, "its < id || (its == id && other < thread)", "its < id"),
    "an id beyond the table": (ROWS, "id >= args.adapters.count", "id > args.adapters.count"),
    "ids read before they are there": (
        ROWS, "rows.unsorted[thread] = id;\n    }\n    __syncthreads();", "rows.unsorted[thread] = id;\n    }", RACE),
    "places read before they are there": (
        ROWS, "rows.row[place] = thread;\n    }\n    __syncthreads();", "rows.row[place] = thread;\n    }", RACE),
    "a segment a row too long": (ROWS, "segments[segment].to = to", "segments[segment].to = to + 1"),
    "adapters of the first slice for all": (ROWS, "slice.first_entry + id", "id"),
    "K's last range runs on": (ROWS, "min(from + each, K)}", "from + each}"),
    # terms
    "fp32 in two terms": (TERMS, "kTerms = 3;", "kTerms = 2;"),
    "fp16 in one term": (TERMS, "kTerms<__half> = 2", "kTerms<__half> = 1"),
    "the rest not kept": (TERMS, "0.0f : rest - term", "0.0f : 0.0f"),
    # shrink
    "another adapter's product": (SHRINK, "if (row >= segment.from && row < segment.to) total[c]", "total[c]"),
    "sums of the segment before": (SHRINK, "sum[c] = 0.0f;", ""),
    "a slab too few": (SHRINK, "(range.to - first_k + kStep - 1) / kStep", "(range.to - first_k) / kStep"),
    "ranks 8 to 15 where there are none": (SHRINK, "some && g + 8 < segment.ranks", "some && g < segment.ranks"),
    "A's rows exchanged": (SHRINK, "a[4] = {low[i], high[i], low[i + 1]", "a[4] = {high[i], low[i], low[i + 1]"),
    "x's words exchanged": (SHRINK, "b[2] = {x[i], x[i + 1]}", "b[2] = {x[i + 1], x[i]}"),
    "A at odd addresses": (SHRINK, "& 15) == 0", "& 0) == 0", "misaligned"),
    "rows and ranks exchanged": (SHRINK, "shared.part[warp][2 * t + c % 2]", "shared.part[warp][2 * t + c / 2]"),
    "warps' sums read before they are there": (
        SHRINK, "total[c];\n    __syncthreads();", "total[c];", RACE),
    "segments read before they are there": (
        SHRINK, "= __popc(all);\n    }\n    __syncthreads();", "= __popc(all);\n    }", RACE),
    "a split not summed": (SHRINK, "for (int other = 0; other < splits", "for (int other = 1; other < splits"),
    "a_i of another rank": (SHRINK, "widen(bias[r])", "widen(bias[lane_rank])"),
    "z of another page": (SHRINK, "to[z_page * kPage + lane_rank] = bias", "to[page * kPage + lane_rank] = bias"),
    "A of the first page for all": (SHRINK, "adapter.first_page + page", "adapter.first_page"),
    # expand
    "a stage read before its copies are there": (
        EXPAND, "copy_async_wait<kStages - 2>", "copy_async_wait<kStages - 1>"),
    "a stage overwritten while it is read": (
        EXPAND, "wait<kStages - 2>();\n        __syncthreads();", "wait<kStages - 2>();"),
    "copies a stage too far": (EXPAND, "ring[ahead % kStages]", "ring[(ahead + 1) % kStages]"),
    "W's chunks not where they are read": (EXPAND, "chunk ^ copied_row / 2 % 8", "chunk ^ copied_row % 8"),
    "x's chunks not where they are read": (EXPAND, "in_x = chunk ^ copied_row % 8", "in_x = chunk"),
    "columns in another order than B's": (
        EXPAND, "warp * 16 + 2 * row + matrix % 2", "warp * 16 + row + 8 * (matrix % 2)"),
    "W's k exchanged": (EXPAND, "2 * i + matrix / 2) ^ row", "2 * i + 1 - matrix / 2) ^ row"),
    "x's second half for the first": (EXPAND, "first[2] = {b[0], b[1]}", "first[2] = {b[2], b[3]}"),
    "W's last row not read": (EXPAND, "source.exists[i] = n < args.N;", "source.exists[i] = n + 1 < args.N;"),
    "x read beyond K": (EXPAND, "source.exists[i] && k + chunk * 8 < to_k", "source.exists[i]"),
    "x in sorted order": (EXPAND, "rows.row[place] * args.x_stride", "place * args.x_stride"),
    "a thread's rows not apart": (EXPAND, "const int n = first + i * kRowStep;", "const int n = first + i;"),
    "y in sorted order": (EXPAND, "int64_t(rows.row[place]) * args.N", "int64_t(place) * args.N"),
    "another adapter's rows": (EXPAND, "inside[c / 2] && place >= segment.from && place", "inside[c / 2] && place"),
    "another slice's columns": (EXPAND, "if (inside[c / 2] && place", "if (place"),
    "B's ranks exchanged": (EXPAND, "const int r = 2 * t + 4 * j;", "const int r = 2 * t + 2 * j;"),
    "v's ranks exchanged": (EXPAND, "b[2] = {v[0], v[4]}", "b[2] = {v[4], v[0]}"),
    "B in pairs at odd addresses": (EXPAND, "% (2 * sizeof(A))) == 0; }", "% 1) == 0; }", "misaligned"),
    "a pair beyond the last rank": (EXPAND, "along_r && r + 1 < ranks", "along_r && r < ranks"),
    "a pair beyond the last column": (EXPAND, "n % 2 == 0 && inside[0] && inside[1]", "n % 2 == 0 && inside[0]"),
    "pages beyond the fourth": (EXPAND, "first < slice.end_page - slice.first_page;", "first < 4;"),
    "the first page of B for all": (EXPAND, "adapter.first_page + next.page", "adapter.first_page"),
    "the first slice's z for all": (
        EXPAND, "args.adapters.z_pages + z_page) * kPage", "args.adapters.z_pages) * kPage"),
    "segments of rows that are not there": (EXPAND, "place < args.M ? rows.segment[place] : -1", "rows.segment[place]"),
    "v without scaling": (EXPAND, "adapter.scaling * activate", "activate"),
    "v without activation": (EXPAND, "activate(adapter.activation, z[q])", "z[q]"),
    "z beyond the rank": (EXPAND, "if (r + q < adapter.rank) v[q]", "v[q]"),
    "v written over the pages before": (
        EXPAND, "if (waited) {\n                    __syncthreads();", "if (waited) {", RACE),
    "v read before it is there": (EXPAND, "first, shared);\n                __syncthreads();", "first, shared);", RACE),
    "no second term of v": (EXPAND, "for (int q = kTermsOfV - 1; q", "for (int q = 0; q"),
    "beta of another slice": (EXPAND, "widen(from[n - slice.from + q])", "widen(from[n + q])"),
    "beta for all": (
        EXPAND, "place >= segment.from && place < segment.to) sum[j][c] += beta",
        "place < segment.to) sum[j][c] += beta"),
    "bias of the neighbour": (
        EXPAND, "{load_bias(args, n), load_bias(args, n + 1)}", "{load_bias(args, n), load_bias(args, n)}"),
    "y in pairs at odd addresses": (EXPAND, "if (args.N % 2 == 0)", "if (true)"),
    "a part not summed": (EXPAND, "for (int other = 1; other < splits", "for (int other = 2; other < splits"),
    "parts of other threads": (
        EXPAND, "splits * kTiles * kThreads + threadIdx.x", "splits * kTiles * kThreads + threadIdx.x / 2"),
    "adapters overwritten while they are read": (
        EXPAND, "continue;\n        __syncthreads();  // no thread reads the adapters",
        "continue;  // no thread reads the adapters", RACE),
    "rows unsorted for shrink": (SOURCE, "        sort_rows(args, shared.rows);\n", ""),
    "nine rows in a tile of eight": (SOURCE, "if (M <= 8)", "if (M <= 9)"),
}  # fmt: skip


def survives(path: str, before: str, after: str, how: str = "") -> str | None:
    """The driver's output for a mutant that it should have noticed but did not; None if it noticed it."""
    said = []
    # ThreadSanitizer takes a hundred times as long per case
    for sanitizer, cases in (("thread", 20),) if how == RACE else (("address", 1000), ("thread", 20)):
        done = drive(sanitizer, cases, path, (before, after))
        report = REPORT.search(done.stderr)
        said.append(report[0] if report else done.stdout.strip())
        if done.returncode and how in said[-1]:
            return None
    return f"expected {how or 'something wrong'}, got {said}"


@pytest.mark.parametrize("mutant", spread(MUTANTS, default=0, full=8))
def test_mutants_are_noticed(mutant: str) -> None:
    assert survives(*MUTANTS[mutant]) is None


# Mutants that do not show in the driver's short sums.
LONG_SUMS = {
    "the sum over K on the tensor cores": (
        EXPAND,
        ("float part[kTiles][4] = {};", "float(&part)[kTiles][4] = sum;"), ("sum[j][c] += part[j][c]", "(void)0")),
    "a slab's sum on the tensor cores": (
        SHRINK, ("    float part[4] = {};", "    float(&part)[4] = sum;"), ("sum[c] += part[c]", "(void)0")),
}  # fmt: skip


@pytest.mark.parametrize("mutant", spread(LONG_SUMS, default=0, full=1))
def test_long_sums_are_not_cut(mutant: str) -> None:
    path, *changes = LONG_SUMS[mutant]
    assert mutant_failure({path: with_changes(path, *changes)}, "lora_linear", "-k", "long_sums") == "wrong"
