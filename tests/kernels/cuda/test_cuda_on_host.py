"""Tests the executor of tests/cuda_emulator.

Correct small kernels pass under the sanitizers. Each of them, broken in one way, is noticed for the right reason.
docs/cuda_on_host.md lists which check notices which mistake.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.host_cuda import HOST, REPORT, execute, needs_host_cuda, program
from tests.support.tiers import spread

pytestmark = needs_host_cuda

SOURCES = sorted((HOST / "selfcheck").glob("*.c*"))
RACE = "ThreadSanitizer: data race"
EARLY = r"a thread returned while others wait at the barrier|__syncthreads: line \d+, while other threads have returned"
UNDEFINED = "undefined"  # this sanitizer does not check for it, and anything may happen
POISON = "AddressSanitizer: use-after-poison"

# How a broken check fails under the sanitizers `address` and `thread`: a report, "wrong" for wrong results without one,
# or None if that sanitizer cannot see it.
BROKEN = {
    "missing_barrier": ("wrong", RACE),
    "missing_barrier_before_overwriting": ("wrong", RACE),
    "missing_warp_barrier": ("wrong", RACE),
    "shuffle_is_no_barrier": (None, RACE),
    "barrier_in_a_branch": (EARLY, EARLY),
    "two_different_barriers": (r"__syncthreads: line \d+, while other threads wait at that of line \d+",) * 2,
    "return_before_a_barrier": (EARLY, EARLY),
    "uninitialised_shared_memory": ("wrong", "wrong"),
    "out_of_bounds_shared": ("AddressSanitizer: heap-buffer-overflow", UNDEFINED),
    "out_of_bounds_global": ("AddressSanitizer: heap-buffer-overflow", UNDEFINED),
    "layout_larger_than_launched": ("the layout has 260 bytes, the launch gives 256",) * 2,
    "misaligned_access": ("runtime error: store to misaligned address", UNDEFINED),
    "missing_release": (None, RACE),
    "missing_acquire": (None, RACE),
    "missing_fence_before": (None, RACE),
    "missing_fence_after": (None, RACE),
    "missing_barrier_before_release": ("wrong", RACE),
    "lost_update": ("wrong", RACE),
    "waits_for_a_block_that_has_not_started": ("a hang: threads wait for what no resident thread does",) * 2,
    "read_before_the_wait": (POISON, "wrong"),
    "write_before_the_wait": (POISON, None),
    "copy_under_way_at_return": ("a thread returned with 1 copies under way",) * 2,
    "copy_without_a_commit": (POISON, r"a thread returned with 1 copies under way"),
    "wait_for_a_group_too_few": (POISON, "wrong"),
    "no_barrier_after_the_wait": (f"{POISON}|wrong", RACE),
    "barrier_before_the_wait": (f"{POISON}|wrong", RACE),
    "source_past_its_end": ("AddressSanitizer: heap-buffer-overflow", None),
    "misaligned_destination": ("copy_async_16: line .* is no multiple of 16",) * 2,
    "destination_not_shared": ("do not lie in the block's shared memory",) * 2,
    "two_copies_to_one_place": (
        "another copy to the same place is under way",
        f"another copy to the same place is under way|{RACE}",
    ),
    "stage_overwritten_while_it_is_read": (POISON, RACE),
    "shuffle_with_a_lane_missing": ("lanes of its warp wait for it at|names lanes that .* have returned",) * 2,
    "mask_without_the_lane": (r"__shfl_xor_sync: line \d+, lane \d+ is not in the mask 0000ff00",) * 2,
    "shuffle_from_a_lane_outside_the_mask": ("takes the value of lane 16, which is not in the mask",) * 2,
    "two_different_shuffles": ("while lanes .* of the warp wait at __shfl_sync of line",) * 2,
    "wrong_fragment": ("wrong", "wrong"),
    "wrong_matrix_row": ("wrong", "wrong"),
    "misaligned_matrix_row": ("load_matrices: line .* is no multiple of 16",) * 2,
}
# Checks without a broken version, compared with loops written from the manuals.
MANUALS = ("all_shuffles", "all_votes", "halves_of_a_warp", "bank_conflicts", "tensor_cores_cut")
SANITIZERS = ("address", "thread")


def failure(sanitizer: str, check: str, how: str, seeds: int) -> str | None:
    """How a check failed: the first line of a report, "wrong", or None."""
    done = execute(program(SOURCES, sanitizer), check, how, seeds)
    report = REPORT.search(done.stderr)
    if report:
        assert done.returncode not in (0, 1, 2), done.stderr
        where = r"cuda_on_host: in block \(\d+, 0, 0\), thread \(\d+, 0, 0\) of launch \d+, kernel, arguments"
        assert re.search(where, done.stderr), f"the report does not name its thread:\n{done.stderr[-4000:]}"
        return report[0]
    assert done.returncode in (0, 1), done.stderr
    return "wrong" if done.returncode else None


def test_every_check_is_listed() -> None:
    listed = execute(program(SOURCES, "address"), "list").stdout.split()
    assert sorted(listed) == sorted([*BROKEN, *MANUALS])


# Under ThreadSanitizer a process takes half a second, however little it does.
@pytest.mark.parametrize("check", spread([*BROKEN, *MANUALS], default=7))
def test_correct_kernels_pass(check: str) -> None:
    for sanitizer, seeds in zip(SANITIZERS, (20, 1), strict=True):
        assert failure(sanitizer, check, "right", seeds) is None


@pytest.mark.parametrize("check", spread(BROKEN, default=7))
def test_broken_kernels_are_noticed(check: str) -> None:
    for sanitizer, expected in zip(SANITIZERS, BROKEN[check], strict=True):
        report = failure(sanitizer, check, "broken", 20 if sanitizer == "address" else 3)
        if expected == UNDEFINED:
            continue
        if expected is None:
            assert report is None, "more is noticed than the table says"
        else:
            assert report is not None, f"{sanitizer}: not noticed"
            assert re.search(expected, report), report


@pytest.mark.parametrize("check", spread([*BROKEN, *MANUALS], default=0, full=12))
def test_correct_kernels_pass_in_every_schedule(check: str) -> None:
    for sanitizer, seeds in zip(SANITIZERS, (1000, 30), strict=True):
        assert failure(sanitizer, check, "right", seeds) is None


@pytest.mark.full
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64",
)
def test_threads_switch_on_arm(tmp_path: Path) -> None:
    """The same checks without sanitizers, since the switch of stacks is written in assembly."""
    out = tmp_path / "selfcheck"
    files = [*SOURCES, *(HOST / f"{name}.cpp" for name in ("executor", "warp", "tensor_cores"))]
    command = ["aarch64-linux-gnu-g++", "-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-static"]
    command += [f"-I{HOST}", f"-I{HOST.parent.parent / 'csrc'}", "-x", "c++", *map(str, files), "-o", str(out)]
    subprocess.run(command, check=True)
    for check in (*BROKEN, *MANUALS):
        done = subprocess.run(["qemu-aarch64", str(out), check, "right", "5"], capture_output=True, text=True)
        assert done.returncode == 0, f"{check}: {done.stdout}{done.stderr}"
