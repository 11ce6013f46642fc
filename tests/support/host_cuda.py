"""Compiles csrc/cuda with g++ for the host, through tests/cuda_emulator, and runs tests/kernels/cuda/on_host/ on it
under sanitizers.

`run` starts pytest on tests/kernels/cuda/on_host/<stem>.py in a process whose `peftk._cuda` is the module for the host;
`caught` does the same with a mutant of a source and says how that showed. `program` links a C++ program instead, for
the race detector. What is compiled stays in build/on_host, by the content of all that went into it.
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
    "-ffp-contract=off",  # as nvcc's --fmad=false
    "-fno-strict-aliasing",  # kernels read memory in vectors of another type, as nvcc allows
]
# What watches the kernels, and how the executor, which is compiled without it, learns of it.
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
    absent = [name for name in ("libasan.so", "libubsan.so", "libtsan.so") if not Path(library(name)).is_file()]
    return f"needs {', '.join(absent)} of g++" if absent else None


def library(name: str) -> str:
    """The path of one of g++'s libraries; the bare name where it has none."""
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


needs_host_cuda = pytest.mark.skipif(missing() is not None, reason=str(missing()))


# ---- Compiling


@functools.cache
def _compiler() -> bytes:
    return subprocess.run(["g++", "--version"], capture_output=True).stdout


def depends_on(source: Path, texts: dict[Path, str]) -> dict[Path, str]:
    """The source and the headers of this checkout that it includes, with what `texts` has in their place."""
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
def made_by_one(target: Path) -> Iterator[bool]:
    """Whether to make it now: processes that want the same at once wait for the first, and find it there."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not target.is_file()
        target.touch()


def compile_object(source: Path, flags: Sequence[str], mutants: dict[Path, str]) -> Path:
    """The object of `source`, compiled again only where something has changed. `mutants`: text in place of files."""
    files = depends_on(source, mutants)
    digest = hashlib.sha256(_compiler())
    for part in (*flags, *(f"{path.relative_to(ROOT)}\0{text}" for path, text in sorted(files.items()))):
        digest.update(part.encode() + b"\0")
    target = BUILD / f"{source.stem}-{digest.hexdigest()[:24]}.o"
    with made_by_one(target) as missing, tempfile.TemporaryDirectory(dir=BUILD) as folder:
        if not missing:
            return target
        # Mutants lie where their originals do below csrc, and are found first.
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
    with made_by_one(target) as missing, tempfile.TemporaryDirectory(dir=BUILD) as folder:
        if missing:
            out = Path(folder, "out")
            command = ["g++", *flags, *map(str, objects), "-ldl", "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            out.replace(target)
    return target


def _build(sources: dict[Path, list[str]], sanitizer: str, texts: dict[str, str], link: list[str], suffix: str) -> Path:
    """Sources with their flags, and the executor, which nothing watches; compiled in parallel, and linked."""
    mutants = {ROOT / path: text for path, text in texts.items()}
    executor_flags = [*EXECUTOR_FLAGS, SANITIZERS[sanitizer][1]]
    executor = {HOST / f"{name}.cpp": executor_flags for name in ("executor", "warp", "tensor_cores")}
    used = set().union(*(depends_on(source, mutants) for source in sources))
    unused = mutants.keys() - used
    assert not unused, f"nothing that is compiled includes {', '.join(map(str, unused))}"
    for old in BUILD.glob("*"):  # mutants of former days
        if old.is_file() and time.time() - old.stat().st_mtime > 3 * 86400:
            old.unlink(missing_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_object, path, own, mutants) for path, own in (sources | executor).items()]
        objects = [job.result() for job in jobs]
    return _link(objects, [*link, *SANITIZERS[sanitizer][0]], suffix)


def module(mutants: dict[str, str] | None = None) -> Path:
    """peftk._cuda for the host. `mutants`: text in place of files, by their path below the root of the checkout."""
    flags = [*FLAGS, *SANITIZERS["address"][0]]
    # First: it takes longest. No kernel is in it, so that nothing is won by -O1.
    sources = {ROOT / "csrc/bindings/cuda.cpp": [*flags, "-O0", *PYTHON_INCLUDES]}
    sources |= {path: flags for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))}
    return _build(sources, "address", mutants or {}, ["-shared"], ".so")


def program(sources: Sequence[Path], sanitizer: str, mutants: dict[str, str] | None = None) -> Path:
    """A program of these sources and the executor, under the sanitizer `address` or `thread`."""
    flags = [*FLAGS, *SANITIZERS[sanitizer][0]]
    return _build(dict.fromkeys(sources, flags), sanitizer, mutants or {}, [], "")


# ---- Running


def pytest_on(built: Path, tier: str, stems: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on tests/kernels/cuda/on_host/<stem>.py, where `built` is peftk._cuda."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=no", "-p", "no:cacheprovider"]
    command += ["-m", MARKERS[tier], *arguments, *(f"tests/kernels/cuda/on_host/{stem}.py" for stem in stems)]
    environment = {
        **os.environ,
        **OPTIONS,
        "PYTEST_ADDOPTS": "",
        "PEFTK_CUDA_ON_HOST": str(built),
        # Python is not linked to the sanitizers, which must come before everything else.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def run(tier: str, *stems: str) -> None:
    """The tests of tests/kernels/cuda/on_host/<stem>.py of this tier pass."""
    judge(pytest_on(module(), tier, stems), tier)


def executed(built: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A program of `program`, run to its end, whichever that is."""
    command = [str(built), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **OPTIONS}, capture_output=True, text=True, timeout=600)


def driven(
    stem: str, sanitizer: str, mutants: dict[str, str] | None, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """tests/cuda_emulator/<stem>_races.cpp with csrc/cuda/<stem>.cu, run to its end."""
    sources = [HOST / f"{stem}_races.cpp", ROOT / f"csrc/cuda/{stem}.cu"]
    return executed(program(sources, sanitizer, mutants), *arguments)


REPORT = re.compile(
    r"AddressSanitizer: [\w-]+|ThreadSanitizer: [\w -]+|runtime error: [^\n]*|cuda_on_host: ERROR: [^\n]*"
)


def replaced(path: str, *changes: tuple[str, str]) -> str:
    """A source with text replaced, each found exactly once."""
    text = (ROOT / path).read_text()
    for before, after in changes:
        found = text.count(before)
        assert found == 1, f"{path} has {found} times, not once: {before!r}"
        text = text.replace(before, after)
    return text


def shown(done: subprocess.CompletedProcess[str]) -> str | None:
    """What pytest or a driver found: the first line of a report, "wrong" where it failed without one, or None."""
    report = REPORT.search(done.stderr)
    # an exit status that is neither passed nor failed, and not reported, is a mistake of the test
    assert report or done.returncode in (0, 1), f"{done.stdout[-20000:]}\n{done.stderr[-20000:]}"
    return report[0].strip() if report else "wrong" if done.returncode else None


def caught(mutants: dict[str, str], stem: str, *arguments: str) -> str | None:
    """How mutants, as `module` takes them, show in tests/kernels/cuda/on_host/<stem>.py. `arguments` go to pytest (-k
    …)."""
    return shown(pytest_on(module(mutants), "default", [stem], *arguments))


def race(stem: str, mutants: dict[str, str] | None = None, *arguments: object) -> str | None:
    """How a kernel, or mutants of it, show under the race detector.

    Before the race, poison may show: an address that nobody has written yet leads nowhere.
    """
    found = shown(driven(stem, "thread", mutants, *arguments))
    assert found is None or re.match(r"ThreadSanitizer: (data race|SEGV)|cuda_on_host: ERROR|wrong", found), found
    return found


# Changes of csrc/cuda/lora_linear.cu: of its 16 forms the four that the driver runs remain, up to 16 rows; fp16 alone,
# bf16 with fp32 adapters.
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
