"""Runs the C++ tests of the CPU kernels: as they are, under sanitizers, and for AArch64.

Their cases run at every SIMD level of the machine. `full` runs more cases, and the sanitizers at every level.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from pathlib import Path

import pytest

from peftk import _cpu
from tests.support import cpp_build

PARITY = ("parity_linear", "parity_merge")
CROSS_CXX, QEMU, SYSROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"

full = pytest.mark.full


def check_parity(programs: list[Path], count: int, levels: list[str], **kwargs: object) -> None:
    for program in programs:
        assert cpp_build.run(program, 0, count, **kwargs) == f"{count} cases at levels {' '.join(levels)}: 0 wrong\n"


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=full), pytest.param(3000, marks=pytest.mark.long)])
def test_parity(count: int) -> None:
    check_parity(cpp_build.programs(*PARITY), count, _cpu.simd_levels())


# The widest level only: it has the most masked tails, and all levels have the same source.
@full
@pytest.mark.parametrize("level", [*_cpu.simd_levels()[:-1], "widest"])
def test_parity_under_address_and_undefined_behaviour_sanitizer(level: str) -> None:
    level = _cpu.simd_levels()[-1] if level == "widest" else level
    flags = ["-O1", "-g1", "-fsanitize=address,undefined"]
    check_parity(build_with_sanitizer(f"asan-{level}", flags, level), 48, [level])


@full
def test_parity_under_thread_sanitizer() -> None:
    # One level is enough: the threads' reads and writes are the same at every level.
    check_parity(build_with_sanitizer("tsan", ["-O1", "-g1", "-fsanitize=thread"], "portable"), 24, ["portable"])


def build_with_sanitizer(variant: str, flags: list[str], level: str) -> list[Path]:
    setup = cpp_build.load_setup()
    if not cpp_build.runs_here(setup, flags):
        pytest.skip(f"{setup.CXX[0]} {' '.join(flags)}: no program that runs here")
    return cpp_build.programs(*PARITY, variant=variant, flags=flags, levels=[level], setup=setup)


@pytest.mark.skipif(
    platform.machine() == "aarch64" or not (shutil.which(CROSS_CXX) and shutil.which(QEMU)),
    reason=f"needs {CROSS_CXX} and {QEMU} on another machine: apt-get install g++-aarch64-linux-gnu qemu-user",
)
@full
def test_parity_on_aarch64_under_qemu() -> None:
    setup = cpp_build.load_setup("aarch64", [CROSS_CXX])
    programs = cpp_build.programs(*PARITY, variant="aarch64", setup=setup)
    check_parity(programs, 240, ["portable", "neon"], runner=[QEMU, "-L", SYSROOT])


@full
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_clang_compiles_every_level(machine: str) -> None:
    """Without a warning."""
    if importlib.util.find_spec("ziglang"):
        # by default, zig traps on undefined behaviour, and does not use 512-bit registers
        clang = [sys.executable, "-m", "ziglang", "c++", "-fno-sanitize=undefined", f"--target={machine}-linux-musl"]
        clang += ["-mevex512"] if machine == "x86_64" else []
    elif shutil.which("clang++"):
        clang = ["clang++", f"--target={machine}-linux-gnu"]
    else:
        pytest.skip("needs clang++, or zig's: pip install ziglang")
    setup = cpp_build.load_setup(machine, clang)
    setup.compiler_accepts = lambda flags: True  # zig cannot preprocess /dev/null
    setup.BUILD = Path(f"build/tests-clang-{machine}")
    setup.CXX_FLAGS.append("-Werror")
    objects = [item for item in setup.cpu_objects() if item.folder != "bindings"]
    cpp_build.build(setup, objects, [item.path for item in objects])
