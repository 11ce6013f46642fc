"""Builds peftk._cpu always, and peftk._cuda where nvcc is found. Everything declarative is in pyproject.toml.

One ninja run compiles all objects, in parallel, and again only what a changed source, header or flag touches.

What is compiled follows from where a file lies, so a new file needs no change here:

    csrc/cpu/kernels/*.cpp   once per SIMD level, with -DPEFTK_LEVEL=<level> and that level's flags
    csrc/cpu/*.cpp           once, at the compiler's baseline architecture, with -DPEFTK_LEVELS_<LEVEL>=1 for each level
    csrc/bindings/cpu.cpp    the same; with the above, the module peftk._cpu
    csrc/cuda/*.cu           by nvcc; with csrc/bindings/cuda.cpp, the module peftk._cuda

Environment: PEFTK_BUILD_CUDA=1 requires nvcc and 0 skips it; PEFTK_CUDA_ARCHS (default "80 90 100 120"); CXX, CUDACXX
and CUDA_HOME name the tools; MAX_JOBS limits the parallel compilations.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if sys.platform != "linux":
    raise SystemExit(f"peftk builds on Linux, got platform {sys.platform!r}")

import fcntl

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build", f"ninja-{sysconfig.get_config_var('SOABI')}")  # kept between builds, whoever starts them

CXX = shlex.split(os.environ.get("CXX", "g++"))
INCLUDES = ["-Icsrc", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
# Without contraction, every a * b + c that is not an explicit fma rounds twice on every machine: exact merges need it.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
CXX_FLAGS += ["-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall"]
CUDA_ARCHS = ("80", "90", "100", "120")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# Ascending, and linked in this order: of an inline function that several levels define, the linker keeps the first,
# which every machine that may reach it can run.
LEVELS = {
    "x86_64": {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]},
    "aarch64": {"portable": [], "neon": []},
}


class Object(NamedTuple):
    """One compilation: rule (`cxx` or `nvcc`), source, flags of its own, and where it goes below BUILD/."""

    rule: str
    source: Path
    flags: list[str]
    folder: str

    @property
    def path(self) -> Path:
        return BUILD / self.folder / f"{self.source.stem}.o"


def sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


def simd_levels() -> dict[str, list[str]]:
    """The SIMD levels of this architecture, ascending, that the compiler knows, with their flags."""
    levels = LEVELS.get(platform.machine(), {"portable": []})
    return {level: flags for level, flags in levels.items() if not flags or compiler_accepts(flags)}


def compiler_accepts(flags: list[str]) -> bool:
    command = [*CXX, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def find_nvcc() -> str | None:
    wanted = os.environ.get("PEFTK_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"PEFTK_BUILD_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX", ""), "nvcc", *(os.path.join(home, "bin", "nvcc") for home in homes if home)]
    nvcc = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if nvcc is None and wanted == "1":
        raise SystemExit(
            "PEFTK_BUILD_CUDA=1 needs nvcc, which is not at $CUDACXX, on PATH, in $CUDA_HOME/bin or in "
            "/usr/local/cuda/bin. Install the CUDA toolkit, say where it is, or set PEFTK_BUILD_CUDA=0."
        )
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    """What to compile for: PEFTK_CUDA_ARCHS as it is, or those of the default list that this nvcc knows."""
    asked = os.environ.get("PEFTK_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    if asked:
        return asked
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in CUDA_ARCHS if f"sm_{arch}" in listed]


def gencode(archs: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest for the GPUs after it."""
    newest = archs[-1]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def cpu_objects() -> list[Object]:
    levels = simd_levels()
    built = [f"-DPEFTK_LEVELS_{level.upper()}=1" for level in levels]
    objects = [Object("cxx", source, built, "cpu") for source in sources("csrc/cpu/*.cpp")]
    objects += [Object("cxx", source, built, "bindings") for source in sources("csrc/bindings/cpu.cpp")]
    for level, flags in levels.items():
        kernel_flags = [f"-DPEFTK_LEVEL={level}", *flags]
        objects += [Object("cxx", source, kernel_flags, f"cpu/{level}") for source in sources("csrc/cpu/kernels/*.cpp")]
    return objects


def cuda_objects(nvcc: str) -> list[Object]:
    flags = gencode(cuda_archs(nvcc))
    objects = [Object("nvcc", source, flags, "cuda") for source in sources("csrc/cuda/*.cu")]
    return objects + [
        Object("nvcc", source, ["-Xcompiler=-Wextra"], "bindings") for source in sources("csrc/bindings/cuda.cpp")
    ]


def words(values: list[str]) -> str:
    """A command line for a ninja variable: quoted for the shell, then for ninja."""
    return shlex.join(values).replace("$", "$$")


def write_ninja(modules: dict[str, list[Object]], nvcc: str | None) -> Path:
    """Writes build.ninja. Depfiles make a changed header rebuild what includes it; a changed flag rebuilds too."""
    cxx_command = words([*CXX, *CXX_FLAGS, *INCLUDES, *shlex.split(os.environ.get("CXXFLAGS", ""))])
    nvcc_command = words([str(nvcc), *NVCC_FLAGS, *INCLUDES])
    link_flags = words(["-shared", "-pthread", *shlex.split(os.environ.get("LDFLAGS", ""))])
    lines = [
        "ninja_required_version = 1.8",
        f"builddir = {BUILD}",
        "rule cxx",
        f"  command = {cxx_command} $flags -MMD -MF $out.d -c $in -o $out",
        "  description = g++ $in $level",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {nvcc_command} $flags -MD -MF $out.d -c $in -o $out",
        "  description = nvcc $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link_cpu",
        f"  command = {words(CXX)} $in {link_flags} -o $out",
        "  description = link $out",
        "rule link_cuda",
        f"  command = {words([str(nvcc)])} -shared -cudart static $in -o $out",
        "  description = link $out",
    ]
    for name, objects in modules.items():
        for item in objects:
            level = item.folder.partition("/")[2]
            lines += [f"build {item.path}: {item.rule} {item.source}", f"  flags = {words(item.flags)}"]
            lines += [f"  level = ({level})"] if level else []
        lines += [f"build {BUILD / name}.so: link_{name} {' '.join(str(item.path) for item in objects)}"]
    path = BUILD / "build.ninja"
    (ROOT / path).write_text("\n".join(lines) + "\n")
    return path


@contextlib.contextmanager
def build_lock() -> Iterator[None]:
    """Two builds in one checkout take turns."""
    (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
    with open(ROOT / BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_ninja(modules: dict[str, list[Object]], nvcc: str | None, *targets: str) -> int:
    """Brings the targets, or everything, up to date; returns ninja's exit code."""
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
    command = [sys.executable, "-m", "ninja", "-f", str(write_ninja(modules, nvcc)), *jobs, *targets]
    return subprocess.run(command, cwd=ROOT).returncode


class NinjaBuild(build_ext):
    """Compiles all extension modules in one ninja run, then copies them to where setuptools wants them."""

    def build_extensions(self) -> None:
        if shutil.which(CXX[0]) is None:
            raise SystemExit(
                f"peftk needs a C++17 compiler, and {CXX[0]!r} is not here: apt-get install g++, or set CXX"
            )
        nvcc = find_nvcc()
        modules = {"cpu": cpu_objects()} | ({"cuda": cuda_objects(nvcc)} if nvcc else {})
        with build_lock():
            if run_ninja(modules, nvcc):
                hint = " Where only nvcc fails, PEFTK_BUILD_CUDA=0 builds without CUDA." if nvcc else ""
                raise SystemExit(f"peftk: compilation failed, see the compiler's messages above.{hint}")
            for name in modules:
                target = Path(self.get_ext_fullpath(f"peftk._{name}"))
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(ROOT / BUILD / f"{name}.so"), str(target))


def extensions() -> list[Extension]:
    """Names and sources for setuptools; NinjaBuild knows how they are compiled."""
    cpu = [*sources("csrc/cpu/*.cpp"), *sources("csrc/cpu/kernels/*.cpp"), *sources("csrc/bindings/cpu.cpp")]
    cuda = [*sources("csrc/cuda/*.cu"), *sources("csrc/bindings/cuda.cpp")]
    modules = {"peftk._cpu": cpu} | ({"peftk._cuda": cuda} if find_nvcc() else {})
    return [Extension(name, [str(source) for source in files]) for name, files in modules.items()]


setup(
    # A top-level package `triton_kernels` would shadow the Triton project's own.
    packages=[*find_packages(include=["peftk", "peftk.*"]), "peftk.triton_kernels"],
    package_dir={"peftk.triton_kernels": "triton_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
