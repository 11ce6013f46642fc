"""The CUDA kernels compiled by nvcc, for GPUs that need not be present: registers, spills, shared memory, SASS."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

ARCHS = ["80", "90a", "100", "120"]
FLAGS = ["-std=c++17", "-O3", "--fmad=false", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-cubin"]  # as in setup.py


class Limits(NamedTuple):
    """A kernel's limit of registers per thread, and the SASS that every instantiation must contain."""

    registers: int
    instructions: tuple[str, ...] = ()


# 128 registers and 256 threads: two blocks fit an SM of 65,536 registers
LIMITS = {
    "merge": Limits(
        128,
        (r"FFMA", r"LDG\.E\S*\.128", r"STG\.E\S*\.128", r"LDS\.128", r"SHFL\.BFLY", r"RED\S*\.ADD", r"ATOMG?\S*\.ADD"),
    ),
    "unmerge": Limits(128, (r"FFMA", r"LDG\.E\S*\.128", r"STG\.E\S*\.128", r"LDS\.128")),
    "restore": Limits(32),
    "sum_rows": Limits(64, (r"LDG\.E\S*\.128", r"SHFL\.BFLY", r"RED\S*\.ADD")),
    "lora_linear": Limits(168, (r"HMMA\.16816\.F32", r"LDSM\.16\.M88\.4", r"LDGSTS\.E\S*\.128", r"LDG\.E\S*\.128")),
    "segments": Limits(80, (r"SHFL\.BFLY", r"VOTE", r"POPC", r"BAR\.SYNC", r"LDS", r"STS")),
    "sort": Limits(80, (r"SHFL\.BFLY", r"BAR\.SYNC")),
    "scan": Limits(80),
    "scatter": Limits(80, (r"VOTE", r"POPC")),
}


class Kernel(NamedTuple):
    """One instantiation in one cubin."""

    kind: str  # the function's name without _kernel
    types: str  # template arguments
    registers: int
    spills: int  # bytes, stores and loads
    shared: int  # bytes of static shared memory
    sass: str

    def __str__(self) -> str:
        return f"{self.kind} {self.types}".rstrip()


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    names = [os.environ.get("CUDACXX", ""), "nvcc", *(os.path.join(home, "bin", "nvcc") for home in homes if home)]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def find_cuobjdump(nvcc: str) -> str | None:
    """cuobjdump, next to nvcc, on PATH or in the triton wheel."""
    triton = importlib.util.find_spec("triton")
    inside = Path(str(triton.origin)).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    names = [str(Path(nvcc).with_name("cuobjdump")), "cuobjdump", *([str(inside)] if inside else [])]
    return next((found for name in names if (found := shutil.which(name))), None)


NVCC = find_nvcc()
CUOBJDUMP = find_cuobjdump(NVCC) if NVCC else None

pytestmark = [pytest.mark.full, pytest.mark.skipif(NVCC is None, reason="needs nvcc")]


def compile_kernels(source: Path, arch: str, folder: Path) -> list[Kernel]:
    cubin = folder / f"{source.stem}.sm_{arch}.cubin"
    command = [str(NVCC), *FLAGS, f"-arch=sm_{arch}", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sass = sass_of(cubin)
    pattern = (
        r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers[^\n]*?(?:, (\d+) bytes smem|\n)"
    )
    found = re.findall(pattern, done.stdout + done.stderr, re.DOTALL)
    assert found, done.stderr
    return [
        Kernel(*demangled(name), int(registers), int(stores) + int(loads), int(shared or 0), sass.get(name, ""))
        for name, stores, loads, registers, shared in found
    ]


def sass_of(cubin: Path) -> dict[str, str]:
    if CUOBJDUMP is None:
        return {}
    listing = subprocess.run([CUOBJDUMP, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : ", listing)[1:]
    return {function.split("\n", 1)[0].strip(): function for function in functions}


def demangled(name: str) -> tuple[str, str]:
    """The kernel and its template arguments from a mangled name: ("merge", "bf16, fp32")."""
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\w+)_kernel(?:<([^>]*)>)?\(", plain)
    assert match is not None, plain
    types = match[2] or ""
    for word, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32"), ("long", "int64")):
        types = types.replace(word, short)
    return match[1], types


@pytest.fixture(scope="module", params=ARCHS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """The kernels of every .cu file."""
    arch = request.param
    listed = subprocess.run([str(NVCC), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{arch.rstrip('a')}" not in listed:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    folder = tmp_path_factory.mktemp("cubins")
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda source: compile_kernels(source, arch, folder), sources)
        return [kernel for some in found for kernel in some]


def shared(kernel: Kernel) -> int:
    """Bytes of shared memory per block that the launcher requests."""
    cuda = pytest.importorskip("peftk._cuda")
    last = int(match[0]) if (match := re.search(r"\d+$", kernel.types)) else 0
    if kernel.kind == "lora_linear":
        return int(cuda.plan_lora_linear(8 * last, 64, 64, 1, 132).shared)
    if kernel.kind in ("segments", "sort", "scan", "scatter"):
        return int(cuda.segments_shared(last if kernel.kind == "segments" else 2000))
    if kernel.kind == "restore":
        return 0
    return int(cuda.merge_tile(0 if kernel.types.startswith("fp32") else 1)[2])


needs_cuobjdump = pytest.mark.skipif(
    CUOBJDUMP is None, reason="needs cuobjdump, of the CUDA toolkit or the triton wheel"
)


def test_registers_spills_and_shared_memory(
    kernels: list[Kernel], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """All shared memory is requested by the launcher, and two blocks fit on a processor with 164 KiB (sm_80)."""
    lines = [f"  {request.node.callspec.params['kernels']}{'registers, bytes of shared memory':>55}"]
    for kernel in sorted(kernels):
        assert kernel.spills == 0, f"{kernel}: {kernel.spills} bytes spilled"
        assert kernel.registers <= LIMITS[kernel.kind].registers, f"{kernel}: {kernel.registers} registers"
        assert kernel.shared == 0, f"{kernel}: {kernel.shared} bytes of static shared memory"
        given = shared(kernel)
        assert given <= 80 * 1024, f"{kernel}: {given} bytes of shared memory"
        lines.append(f"  {kernel!s:<40}{kernel.registers:>4}{given:>8}")
    with capsys.disabled():
        print("", *lines, sep="\n")


@needs_cuobjdump
def test_instructions(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        for instruction in LIMITS[kernel.kind].instructions:
            assert re.search(instruction, kernel.sass), f"{kernel}: no {instruction}"


@needs_cuobjdump
def test_merge_rounds_what_it_must_round(kernels: list[Kernel]) -> None:
    """s·t, the sum of d over adapters, W + d and W' - d are rounded separately: for each of a thread's 32 outputs merge
    has one FMUL and three FADD, unmerge two FADD. Fewer would mean a contraction. None flushes denormals."""
    found = {kernel.kind for kernel in kernels}
    assert {"merge", "unmerge"} <= found
    for kernel in kernels:
        if kernel.kind in ("merge", "unmerge"):
            sums = 3 if kernel.kind == "merge" else 2
            assert operations("FMUL", kernel.sass) == 32, kernel
            assert operations("FADD", kernel.sass) == 32 * sums, kernel
            flushing = re.search(r"\bF(?:ADD|MUL|FMA)\S*\.FTZ", kernel.sass)
            assert flushing is None, f"{kernel}: {flushing and flushing[0]} flushes denormals"


def operations(name: str, sass: str) -> int:
    """The number of such operations; FADD2 and the like count as two."""
    return len(re.findall(rf"\b{name}\b", sass)) + 2 * len(re.findall(rf"\b{name}2\b", sass))


@needs_cuobjdump
def test_segments_sort_in_loops(kernels: list[Kernel]) -> None:
    """A few times as many shuffles as a thread has keys: the sort's loops are not unrolled."""
    for kernel in kernels:
        if kernel.kind in ("segments", "sort"):
            most = 6 if kernel.types.endswith(" 64") else 24
            assert operations(r"SHFL\.BFLY", kernel.sass) <= most, kernel
