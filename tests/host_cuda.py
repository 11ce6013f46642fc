"""Compiles csrc/cuda with g++ for the host, through tests/cuda_on_host, and runs tests/on_host/ on it under sanitizers.

`run` starts pytest on tests/on_host/<stem>.py in a process whose `peftk._cuda` is the module for the host; `caught`
does the same with a mutant of a source and says how that showed. `program` links a C++ program instead, for the race
detector. What is compiled stays in build/on_host, by the content of all that went into it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = ROOT / "tests/cuda_on_host"
BUILD = ROOT / "build/on_host"
INCLUDES = [f"-I{HOST}", f"-I{ROOT / 'csrc'}"]
PYTHON_INCLUDES = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    "-ffp-contract=off",  # as nvcc's --fmad=false
    "-fno-strict-aliasing",  # kernels read memory in vectors of another type, as nvcc allows
]
# What watches the kernels, and how the executor, which is compiled without it, learns of it.
SANITIZERS = {
    "address": (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "-DCUDA_ON_HOST_ASAN"),
    "thread": (["-fsanitize=thread"], "-DCUDA_ON_HOST_TSAN"),
}
EXECUTOR_FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
OPTIONS = {
    # handle_segv=2: pytest's fault handler, which comes later, does not take the signal away
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:handle_segv=2:handle_sigbus=2:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:abort_on_error=0:exitcode=66",
}


@functools.cache
def missing() -> str | None:
    """Why nothing can be compiled or run here, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    absent = [name for name in ("libasan.so", "libubsan.so") if not Path(library(name)).is_file()]
    return f"needs {', '.join(absent)} of g++" if absent else None


def library(name: str) -> str:
    """The path of one of g++'s libraries; the bare name where it has none."""
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


needs_host_cuda = pytest.mark.skipif(missing() is not None, reason=str(missing()))


# ---- Compiling


@functools.cache
def _common() -> bytes:
    """A digest of what any object may depend on: all headers, and the compiler."""
    digest = hashlib.sha256(subprocess.run(["g++", "--version"], capture_output=True).stdout)
    for folder in (HOST, ROOT / "csrc"):
        for path in sorted(folder.rglob("*.*h")):
            digest.update(f"{path.relative_to(ROOT)}".encode() + path.read_bytes())
    return digest.digest()


def compile_object(source: Path, flags: Sequence[str], text: str | None = None) -> Path:
    """The object of `source`, or of `text` in its place, compiled again only where something has changed."""
    content = source.read_text() if text is None else text
    digest = hashlib.sha256(_common())
    for part in (str(source), *flags, content):
        digest.update(part.encode() + b"\0")
    target = BUILD / f"{source.stem}-{digest.hexdigest()[:24]}.o"
    if target.is_file():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        # A mutant keeps its file's name, and finds what lies beside its original.
        file, beside = source, []
        if text is not None:
            file, beside = Path(folder, source.name), [f"-iquote{source.parent}"]
            file.write_text(text)
        out = Path(folder, "out.o")
        command = ["g++", *flags, *beside, *INCLUDES, "-x", "c++", "-c", str(file), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source} does not compile for the host:\n{done.stderr}"
        out.replace(target)
    return target


def _link(objects: Sequence[Path], flags: Sequence[str], suffix: str) -> Path:
    digest = hashlib.sha256("\0".join([*map(str, objects), *flags]).encode()).hexdigest()[:24]
    target = BUILD / f"linked-{digest}{suffix}"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            out = Path(folder, "out")
            command = ["g++", *flags, *map(str, objects), "-ldl", "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            out.replace(target)
    return target


def _objects(jobs: Sequence[tuple[Path, list[str], str | None]]) -> list[Path]:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: compile_object(*job), jobs))


def _executor(sanitizer: str) -> list[tuple[Path, list[str], str | None]]:
    flags = [*EXECUTOR_FLAGS, SANITIZERS[sanitizer][1]]
    return [(HOST / f"{name}.cpp", flags, None) for name in ("executor", "warp", "tensor_cores")]


def module(mutants: dict[str, str] | None = None) -> Path:
    """peftk._cuda for the host. `mutants`: text in place of sources, by their path below the root of the checkout."""
    flags = [*FLAGS, *SANITIZERS["address"][0]]
    kernels = [(path, flags) for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    bindings = (ROOT / "csrc/bindings/cuda.cpp", [*flags, *PYTHON_INCLUDES])
    texts = {ROOT / path: text for path, text in (mutants or {}).items()}
    jobs = [(path, own, texts.pop(path, None)) for path, own in (bindings, *kernels)]
    assert not texts, f"no source of peftk._cuda: {', '.join(map(str, texts))}"
    return _link(_objects([*jobs, *_executor("address")]), ["-shared", *SANITIZERS["address"][0]], ".so")


def program(sources: Sequence[Path], sanitizer: str, mutants: dict[Path, str] | None = None) -> Path:
    """A program of these sources and the executor, under the sanitizer `address` or `thread`."""
    flags = SANITIZERS[sanitizer][0]
    jobs = [(path, [*FLAGS, *flags], (mutants or {}).get(path)) for path in sources]
    return _link(_objects([*jobs, *_executor(sanitizer)]), flags, "")


# ---- Running


def pytest_on(built: Path, marker: str, stems: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on tests/on_host/<stem>.py, where `built` is peftk._cuda."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=no", "-p", "no:cacheprovider", "-m", marker]
    command += [*arguments, *(f"tests/on_host/{stem}.py" for stem in stems)]
    environment = {
        **os.environ,
        **OPTIONS,
        "PYTEST_ADDOPTS": "",
        "PEFTK_CUDA_ON_HOST": str(built),
        # Python is not linked to the sanitizers, which must come before everything else.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def run(marker: str, *stems: str) -> None:
    """The tests of tests/on_host/<stem>.py with this marker pass."""
    done = pytest_on(module(), marker, stems)
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-20000:]}"
    assert " passed" in done.stdout


REPORT = re.compile(r"ERROR: AddressSanitizer: [\w-]+|runtime error: [^\n]*|cuda_on_host: ERROR: [^\n]*")


def replaced(path: str, *changes: tuple[str, str]) -> str:
    """A source with text replaced, each found exactly once."""
    text = (ROOT / path).read_text()
    for before, after in changes:
        found = text.count(before)
        assert found == 1, f"{path} has {found} times, not once: {before!r}"
        text = text.replace(before, after)
    return text


def caught(path: str, changes: Sequence[tuple[str, str]], stem: str, *arguments: str) -> str | None:
    """How a mutant of csrc/…/<file> shows in tests/on_host/<stem>.py: the first line of a report, "wrong" where a test
    fails without one, or None: not at all. `arguments` go to pytest (-k …)."""
    done = pytest_on(module({path: replaced(path, *changes)}), "not full", [stem], *arguments)
    report = REPORT.search(done.stderr)
    if report:
        return report[0]
    # pytest's own exit status: anything but passed or failed is a mistake of the test
    assert done.returncode in (0, 1), f"{done.stdout[-20000:]}\n{done.stderr[-20000:]}"
    return "wrong" if done.returncode else None
