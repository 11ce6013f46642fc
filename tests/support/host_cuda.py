"""Compiles csrc/cuda with g++ for the host, through tests/cuda_emulator, and runs tests/kernels/cuda/on_host/ on it
under sanitizers.

`run` starts pytest on tests/kernels/cuda/on_host/<stem>.py in a process whose `peftk._cuda` is the module for the host.
`mutant_failure` does the same with a mutant of a source, and returns how the tests failed. `program` links a C++
program instead, for the race detector. Compiled files are kept in build/on_host, under a hash of all their inputs.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pybind11
import pytest

from tests.support.paths import ROOT
from tests.support.tiers import MARKERS, judge

HOST = ROOT / "tests/cuda_emulator"
BUILD = ROOT / "build/on_host"
INCLUDES = [f"-I{HOST}", f"-I{ROOT / 'csrc'}"]
PYTHON_INCLUDES = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    "-ffp-contract=off",  # like nvcc's --fmad=false
    "-fno-strict-aliasing",  # kernels read memory in vectors of another type, as nvcc allows
]
# Flags of each sanitizer, and the define by which the executor, compiled without it, knows which one is used.
SANITIZERS = {
    "address": (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "-DCUDA_ON_HOST_ASAN"),
    # g++ would expand these into stores that the race detector does not see
    "thread": (
        ["-fsanitize=thread", *(f"-fno-builtin-mem{name}" for name in ("set", "cpy", "move"))],
        "-DCUDA_ON_HOST_TSAN",
    ),
}
EXECUTOR_FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
OPTIONS = {
    # handle_segv=2: so that pytest's fault handler, installed later, does not take over the signal
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:handle_segv=2:handle_sigbus=2:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:abort_on_error=0:exitcode=66",
}


@functools.cache
def missing() -> str | None:
    """Why nothing can be compiled or run here, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    absent = [name for name in ("libasan.so", "libubsan.so", "libtsan.so") if not Path(library(name)).is_file()]
    return f"needs {', '.join(absent)} of g++" if absent else None


def library(name: str) -> str:
    """The path of one of g++'s libraries; the bare name if it does not have it."""
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


needs_host_cuda = pytest.mark.skipif(missing() is not None, reason=str(missing()))


# ---- Compiling


@functools.cache
def _compiler() -> bytes:
    return subprocess.run(["g++", "--version"], capture_output=True).stdout


def depends_on(source: Path, texts: dict[Path, str]) -> dict[Path, str]:
    """Text of the source and of the checkout's headers that it includes. `texts` has replacements by path."""
    found: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = texts.get(path) or path.read_text()
        for name in re.findall(r'^\s*#include ["<]([^">]+)[">]', found[path], re.MULTILINE):
            candidates = [path.parent / name, HOST / name, ROOT / "csrc" / name]
            waiting += [candidate for candidate in candidates if candidate.is_file()][:1]
    return found


@contextlib.contextmanager
def build_once(target: Path) -> Iterator[bool]:
    """Yields whether to build the target now. If several processes need it at once, the first one builds it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not target.is_file()
        target.touch()


def compile_object(source: Path, flags: Sequence[str], mutants: dict[Path, str]) -> Path:
    """The object of `source`, compiled again only if something has changed. `mutants`: text that replaces files."""
    files = depends_on(source, mutants)
    digest = hashlib.sha256(_compiler())
    for part in (*flags, *(f"{path.relative_to(ROOT)}\0{text}" for path, text in sorted(files.items()))):
        digest.update(part.encode() + b"\0")
    target = BUILD / f"{source.stem}-{digest.hexdigest()[:24]}.o"
    with build_once(target) as missing, tempfile.TemporaryDirectory(dir=BUILD) as folder:
        if not missing:
            return target
        # Mutants have the same path below the folder as their originals below csrc, and are found first.
        for path in mutants.keys() & files.keys():
            changed = Path(folder, path.relative_to(ROOT / "csrc"))
            changed.parent.mkdir(parents=True, exist_ok=True)
            changed.write_text(mutants[path])
        file = Path(folder, source.relative_to(ROOT / "csrc")) if source in mutants else source
        out = Path(folder, "out.o")
        command = ["g++", *flags, f"-I{folder}", *INCLUDES, "-x", "c++", "-c", str(file), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source} does not compile for the host:\n{done.stderr}"
        out.replace(target)
    return target


def _link(objects: Sequence[Path], flags: Sequence[str], suffix: str) -> Path:
    digest = hashlib.sha256("\0".join([*map(str, objects), *flags]).encode()).hexdigest()[:24]
    target = BUILD / f"linked-{digest}{suffix}"
    with build_once(target) as missing, tempfile.TemporaryDirectory(dir=BUILD) as folder:
        if missing:
            out = Path(folder, "out")
            command = ["g++", *flags, *map(str, objects), "-ldl", "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            out.replace(target)
    return target


def _build(sources: dict[Path, list[str]], sanitizer: str, texts: dict[str, str], link: list[str], suffix: str) -> Path:
    """Compiles sources with their flags, and the executor without sanitizer flags, in parallel, and links them."""
    mutants = {ROOT / path: text for path, text in texts.items()}
    executor_flags = [*EXECUTOR_FLAGS, SANITIZERS[sanitizer][1]]
    executor = {HOST / f"{name}.cpp": executor_flags for name in ("executor", "warp", "tensor_cores")}
    used = set().union(*(depends_on(source, mutants) for source in sources))
    unused = mutants.keys() - used
    assert not unused, f"nothing that is compiled includes {', '.join(map(str, unused))}"
    for old in BUILD.glob("*"):  # old mutants
        if old.is_file() and time.time() - old.stat().st_mtime > 3 * 86400:
            old.unlink(missing_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_object, path, own, mutants) for path, own in (sources | executor).items()]
        objects = [job.result() for job in jobs]
    return _link(objects, [*link, *SANITIZERS[sanitizer][0]], suffix)


def module(mutants: dict[str, str] | None = None, *, quick: bool = False) -> Path:
    """Builds peftk._cuda for the host. `mutants`: text that replaces files, by path below the root of the checkout.

    `quick`: the bindings without the sanitizer of undefined behaviour, which doubles the time to compile them.
    """
    flags = [*FLAGS, *SANITIZERS["address"][0]]
    bindings = [*FLAGS, "-fsanitize=address"] if quick else flags
    # First, since it takes longest. It contains no kernel, so -O1 would gain nothing.
    sources = {ROOT / "csrc/bindings/cuda.cpp": [*bindings, "-O0", *PYTHON_INCLUDES]}
    # -Og compiles in half the time and runs a little slower.
    sources |= {path: [*flags, "-Og"] for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))}
    return _build(sources, "address", mutants or {}, ["-shared"], ".so")


def program(sources: Sequence[Path], sanitizer: str, mutants: dict[str, str] | None = None) -> Path:
    """Builds a program of these sources and the executor, with the sanitizer `address` or `thread`."""
    flags = [*FLAGS, *SANITIZERS[sanitizer][0]]
    return _build(dict.fromkeys(sources, flags), sanitizer, mutants or {}, [], "")


# ---- Running


def run_pytest(built: Path, tier: str, stems: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest on tests/kernels/cuda/on_host/<stem>.py with `built` as peftk._cuda."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=no", "-p", "no:cacheprovider"]
    command += ["-m", MARKERS[tier], *arguments, *(f"tests/kernels/cuda/on_host/{stem}.py" for stem in stems)]
    environment = {
        **os.environ,
        **OPTIONS,
        "PYTEST_ADDOPTS": "",
        "PEFTK_CUDA_ON_HOST": str(built),
        # Python is not linked with the sanitizers, which must be loaded first.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def run(tier: str, *stems: str) -> None:
    """Raises AssertionError unless this tier of tests/kernels/cuda/on_host/<stem>.py passes."""
    judge(run_pytest(module(quick=tier == "default"), tier, stems), tier)


def execute(built: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program built by `program`, whatever its exit status."""
    command = [str(built), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **OPTIONS}, capture_output=True, text=True, timeout=600)


def run_driver(
    stem: str, sanitizer: str, mutants: dict[str, str] | None, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Builds tests/cuda_emulator/<stem>_races.cpp with csrc/cuda/<stem>.cu, and runs it."""
    sources = [HOST / f"{stem}_races.cpp", ROOT / f"csrc/cuda/{stem}.cu"]
    return execute(program(sources, sanitizer, mutants), *arguments)


REPORT = re.compile(
    r"AddressSanitizer: [\w-]+|ThreadSanitizer: [\w -]+|runtime error: [^\n]*|cuda_on_host: ERROR: [^\n]*"
)


def with_changes(path: str, *changes: tuple[str, str]) -> str:
    """The text of a source with changes (before, after). Each `before` must be found exactly once."""
    text = (ROOT / path).read_text()
    for before, after in changes:
        found = text.count(before)
        assert found == 1, f"{path} has {found} times, not once: {before!r}"
        text = text.replace(before, after)
    return text


def failure(done: subprocess.CompletedProcess[str]) -> str | None:
    """How pytest or a driver failed: the first line of a report, "wrong" without a report, or None if it passed."""
    report = REPORT.search(done.stderr)
    # any other exit status without a report is a mistake in the test
    assert report or done.returncode in (0, 1), f"{done.stdout[-20000:]}\n{done.stderr[-20000:]}"
    return report[0].strip() if report else "wrong" if done.returncode else None


def mutant_failure(mutants: dict[str, str], stem: str, *arguments: str) -> str | None:
    """How tests/kernels/cuda/on_host/<stem>.py fails with mutants (see `module`), or None. `arguments`: of pytest."""
    return failure(run_pytest(module(mutants), "default", [stem], *arguments))


def race(stem: str, mutants: dict[str, str] | None = None, *arguments: object) -> str | None:
    """How a kernel, or mutants of it, fail under the race detector, or None.

    Poison may show before the race does: an address that has not been written yet is invalid.
    """
    found = failure(run_driver(stem, "thread", mutants, *arguments))
    assert found is None or re.match(r"ThreadSanitizer: (data race|SEGV)|cuda_on_host: ERROR|wrong", found), found
    return found


# Changes of csrc/cuda/lora_linear.cu that keep only 4 of its 16 instantiations, those that the driver runs: up to 16
# rows; fp16 only, and bf16 with fp32 adapters.
FEWER_FORMS = (
    ("    if (M <= 16) return body(std::integral_constant<int, 2>{});\n", ""),
    ("    if (M <= 32) return body(std::integral_constant<int, 4>{});\n", ""),
    ("return body(std::integral_constant<int, 8>{});", "return body(std::integral_constant<int, 2>{});"),
    (
        "    if (args.adapters.dtype == args.dtype) return for_rows<T, T>(args, plan, stream);\n"
        "    if (args.adapters.dtype == Dtype::kFloat32) return for_rows<T, float>(args, plan, stream);\n"
        "    return Unsupported::kDtype;\n",
        "    return for_rows<T, std::conditional_t<std::is_same_v<T, __half>, T, float>>(args, plan, stream);\n",
    ),
)
