"""csrc/cuda under the race detector: tests/cuda_on_host/races/<stem>.cpp calls a launcher. Every CUDA thread is one of
ThreadSanitizer's threads, and a missing barrier, wait, release or acquire is a data race in most schedules."""

from __future__ import annotations

import pytest

from tests.host_cuda import HOST, REPORT, ROOT, executed, needs_host_cuda, program, replaced

pytestmark = needs_host_cuda

RACE = "ThreadSanitizer: data race"
TICKETS, EXPAND = "csrc/cuda/tickets.cuh", "csrc/cuda/expand.cuh"
BARRIER = "    __syncthreads();\n"


def shown(stem: str, seeds: int, mutants: dict[str, str] | None = None) -> str | None:
    """A report's first line, "wrong" for wrong results without one, or None."""
    sources = [HOST / f"races/{stem}.cpp", ROOT / f"csrc/cuda/{stem}.cu"]
    done = executed(program(sources, "thread", mutants), seeds)
    report = REPORT.search(done.stderr)
    assert report or done.returncode in (0, 1), done.stderr
    return report[0].strip() if report else "wrong" if done.returncode else None


def test_lora_linear_has_no_race() -> None:
    assert shown("lora_linear", 2) is None


@pytest.mark.full
def test_lora_linear_has_no_race_in_any_of_many_schedules() -> None:
    assert shown("lora_linear", 60) is None


# Each by one word or line of the protocol.
MUTANTS = {
    "published before all threads have stored": (
        TICKETS,
        f"{BARRIER}    if (threadIdx.x == 0) add_release",
        "    if (threadIdx.x == 0) add_release",
    ),
    "published without a release": (TICKETS, "add_release(counters + kPublished", "add_relaxed(counters + kPublished"),
    "waited for without an acquire": (
        TICKETS,
        "load_acquire(counters + kPublished)",
        "add_relaxed(const_cast<int*>(counters) + kPublished, 0)",
    ),
    "arrived before all threads have stored": (
        TICKETS,
        f"{BARRIER}    if (threadIdx.x == 0) {{\n",
        "    if (threadIdx.x == 0) {\n",
    ),
    "arrived without an acquire": (TICKETS, "to_all = add_acq_rel(arrivals", "to_all = add_release(arrivals"),
    "arrived without a release": (TICKETS, "to_all = add_acq_rel(arrivals", "to_all = add_relaxed(arrivals"),
    "read before it is known who came last": (
        TICKETS,
        f"    }}\n{BARRIER}    return to_all",
        "    }\n    return to_all",
    ),
    "read before the ticket is drawn": (
        TICKETS,
        f"add_relaxed(counters + kDrawn, 1);\n{BARRIER}",
        "add_relaxed(counters + kDrawn, 1);\n",
    ),
    "left without an order": (TICKETS, "add_acq_rel(counters + kLeft", "add_relaxed(counters + kLeft"),
    "a stage too few waited for": (EXPAND, "copy_async_wait<kStages - 2>", "copy_async_wait<kStages - 1>"),
    "a stage read before the barrier": (
        EXPAND,
        f"        copy_async_wait<kStages - 2>();\n    {BARRIER.rstrip()}",
        "        copy_async_wait<kStages - 2>();",
    ),
}


def caught(mutant: str) -> None:
    path, before, after = MUTANTS[mutant]
    assert shown("lora_linear", 5, {path: replaced(path, (before, after))}) == RACE


def test_a_missing_release_is_a_race() -> None:
    caught("published without a release")


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_lora_linear_have_races(mutant: str) -> None:
    caught(mutant)
