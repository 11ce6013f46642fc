"""The CPU backend's thread pool: forks, other threads, changing thread counts, exit."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

from peftk import LoRALinear, _cpu
from peftk.adapters.adapter import Adapter
from peftk.backends import cpu
from tests.support import cases
from tests.support.paths import ROOT
from tests.support.tiers import FULL

SHAPE = (64, 256, 512)  # enough work for several threads


@pytest.fixture(autouse=True)
def four_threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def inputs() -> tuple[torch.Tensor, torch.Tensor, Adapter]:
    M, N, K = SHAPE
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(M, K, generator=generator), torch.randn(N, K, generator=generator)
    return x, weight, Adapter((torch.ones(8, K),), (torch.ones(N, 8),), 0.5)


def run() -> torch.Tensor:
    x, weight, adapter = inputs()
    return cpu.lora_linear(x, weight, None, adapter)[0]


def test_any_number_of_threads_gives_the_same_bits() -> None:
    expected = run()
    for count in (1, 3, 2, 4):
        torch.set_num_threads(count)
        assert torch.equal(run(), expected)


def test_torchs_threads_are_borrowed_where_torch_has_openmp() -> None:
    """In a process of its own: here, earlier jobs may have found them late."""
    script = (
        "import torch; torch.set_num_threads(4); from peftk import _cpu;"
        "from tests.kernels.cpu.test_threads import run; run(); print(_cpu.borrows_openmp(), _cpu.pool_workers())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == (["True", "0"] if torch.backends.openmp.is_available() else ["False", "3"])


def test_a_forked_child_has_a_pool_of_its_own() -> None:
    expected = run()
    for _ in range(3):
        child = os.fork()
        if child == 0:  # the child has no libgomp threads, and waiting for them would hang
            os._exit(
                0
                if not _cpu.borrows_openmp()
                and _cpu.pool_workers() == 0
                and torch.equal(run(), expected)
                and _cpu.pool_workers() == 3
                else 1
            )
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(run(), expected)


def test_forks_while_other_threads_use_the_pool() -> None:
    expected, stop, wrong = run(), threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            if not torch.equal(run(), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(run(), expected) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert not wrong


class Adapted(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        torch.set_num_threads(2)
        return run()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=FULL)])
def test_dataloader_workers(method: str) -> None:
    expected = run()
    loader = torch.utils.data.DataLoader(Adapted(), num_workers=2, multiprocessing_context=method, timeout=60)
    for batch in loader:
        assert torch.equal(batch[0], expected)
        assert torch.equal(run(), expected)  # the parent keeps computing meanwhile


def check_in_process(method: str, expected: list[list[float]], nested: str | None = None) -> None:
    """run() gives the expected result in a new process, and in a process started by that one."""
    process = torch.multiprocessing.get_context(method).Process(target=check_here, args=(expected, nested))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0


def check_here(expected: list[list[float]], nested: str | None) -> None:
    torch.set_num_threads(3)
    assert run().tolist() == expected
    if nested:
        check_in_process(nested, expected)
        assert run().tolist() == expected


@pytest.mark.parametrize(("outer", "inner"), [("fork", "fork"), ("spawn", "fork")])
def test_processes_in_processes(outer: str, inner: str) -> None:
    check_in_process(outer, run().tolist(), inner)


def test_python_threads_at_once() -> None:
    expected, results = run(), []

    def work() -> None:
        results.extend(torch.equal(run(), expected) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert results == [True] * 100


def step(seed: int) -> list[torch.Tensor]:
    """Forward and backward of a random case: shape, dtypes, adapters, ids, with or without inference mode."""
    case = cases.random_case(seed, many=True, max_rows=100, max_width=400)
    table, ids = case.table(), case.ids
    assert ids is not None
    with torch.inference_mode(seed % 2 == 0):
        y, z = cpu.multi_lora_linear(case.x, case.weight, case.bias, table, ids, save_z=True)
        assert z is not None
        dx, grads = cpu.multi_lora_linear_backward(y, case.x, case.weight, table, ids, z)
        return [y, dx, *(t for g in grads if g is not None for t in g if t is not None)]


def test_python_threads_at_once_with_unlike_calls() -> None:
    """Different calls at once, with numbers of threads that change from call to call."""
    seeds = range(24)
    expected = {seed: step(seed) for seed in seeds}
    wrong = []

    def work(number: int) -> None:
        for seed in random.Random(number).sample(seeds, len(seeds)):
            torch.set_num_threads(1 + (seed + number) % 4)
            results = step(seed)
            if not all(map(torch.equal, results, expected[seed])):
                wrong.append((number, seed))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert not wrong


def test_layers_under_inference_mode_in_threads() -> None:
    """A layer shared by threads, with a different batch size in each, gives the same results as in a single thread."""
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(torch.nn.Linear(256, 384), r=8)
    torch.nn.init.normal_(layer.lora_B)
    batches = [torch.randn(rows, 256) for rows in (1, 3, 17, 64, 130)]
    with torch.inference_mode():
        expected = [layer(x) for x in batches]
    right = []

    def work(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.inference_mode():  # each thread has its own
            right.extend(torch.equal(layer(x), y) for _ in range(20))

    workers = [threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert right == [True] * 100


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a free-threaded Python")
def test_the_gil_stays_off() -> None:
    script = "import peftk, peftk._cpu, sys; print(sys._is_gil_enabled())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


@FULL
def test_the_process_ends_with_the_pool_alive() -> None:
    """Several times; once is in test_direct_calls_stay_on_their_thread."""
    script = (
        "import torch; torch.set_num_threads(4); from tests.kernels.cpu.test_threads import run; run(); print('done')"
    )
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().strip() == "done"


SMALL_CALLS = """
import os, torch
from tests.kernels.cpu.test_threads import run
from peftk.backends import cpu
torch.set_num_threads(4)
x, weight = torch.ones(1, 64), torch.ones(64, 64)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
cpu.lora_linear(x, weight, None, None)
small = threads()
run()
print(small - before, threads() - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_direct_calls_stay_on_their_thread() -> None:
    """And the process ends, with the pool alive."""
    done = subprocess.run([sys.executable, "-c", SMALL_CALLS], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["0", "3"]


OUT_OF_MEMORY = """
import resource, torch
from peftk.backends import cpu
from peftk.adapters.table import Adapter
from tests.kernels.cpu.test_threads import run
torch.set_num_threads(4)
expected = run()
x, weight, rank = torch.ones(64, 32), torch.ones(4096, 32), 60_000
adapter = Adapter((torch.ones(1, 32).expand(rank, 32),), (torch.ones(1, 1).expand(4096, rank),), 1.0)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for spare in (4, 20):  # MiB: too little for v, for a block of any thread
    resource.setrlimit(resource.RLIMIT_AS, (used + (spare << 20), resource.RLIM_INFINITY))
    try:
        cpu.lora_linear(x, weight, None, adapter)
        print("served")
    except MemoryError:
        print("MemoryError", torch.equal(run(), expected))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(torch.equal(run(), expected))
"""


def test_memory_that_a_worker_lacks_is_a_memory_error() -> None:
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["MemoryError True"] * 2 + ["True"]


def build_program(folder: Path, program: str, sources: tuple[str, ...], *flags: str) -> Path:
    """Builds tests/kernels/cpu/cpp/`program`.cpp with these of csrc/cpu. Skips if the compiler is missing or does not
    support `flags`."""
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(cxx[0]) is None:
        pytest.skip(f"no C++ compiler: {cxx[0]}")
    command = [*cxx, "-std=c++17", "-O1", "-g", "-pthread", *flags, "-o"]
    empty = folder / "empty"
    probe = subprocess.run([*command, empty, "-x", "c++", "-"], input="int main() {}", capture_output=True, text=True)
    if probe.returncode or subprocess.run([empty], capture_output=True).returncode:
        pytest.skip(f"{cxx[0]} {' '.join(flags)}: no program that runs here")
    files = [ROOT / f"tests/kernels/cpu/cpp/{program}.cpp", *(ROOT / f"csrc/cpu/{name}.cpp" for name in sources)]
    subprocess.run([*command, folder / program, f"-I{ROOT / 'csrc'}", *files], check=True)
    return folder / program


@pytest.mark.parametrize("flags", [pytest.param((), marks=FULL), ("-fsanitize=thread",)])
def test_the_pool_alone(tmp_path: Path, flags: tuple[str, ...]) -> None:
    options = {"TSAN_OPTIONS": "die_after_fork=0 allocator_may_return_null=1"}
    program = build_program(tmp_path, "thread_pool", ("thread_pool", "openmp", "scratch"), *flags)
    done = subprocess.run([program, "2000"], env=os.environ | options, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_which_threads_are_late(tmp_path: Path) -> None:
    done = subprocess.run([build_program(tmp_path, "lateness", ())], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize("flags", [(), pytest.param(("-fsanitize=thread",), marks=FULL)])
def test_threads_that_come_late(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Three tries: on a busy machine a call that should be in time may take milliseconds."""
    program = build_program(tmp_path, "late_threads", ("thread_pool",), *flags)
    tries = [subprocess.run([program], capture_output=True, text=True, timeout=60) for _ in range(3)]
    assert any(done.returncode == 0 and not done.stderr for done in tries), tries
