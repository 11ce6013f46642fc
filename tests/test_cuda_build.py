"""What nvcc makes of the CUDA kernels, for GPUs that need not be there: registers, spills, shared memory, SASS."""

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

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90", "100", "120")
FLAGS = ["-std=c++17", "-O3", "--fmad=false", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-cubin"]  # as in setup.py


class Limits(NamedTuple):
    """Of one .cu file: what its kernels may use, and the SASS that each must contain."""

    registers: int
    shared: int
    instructions: tuple[str, ...]


LIMITS = {
    # 128 registers and 256 threads: two blocks fit an SM of 65,536 registers
    "merge": Limits(128, 16_384, (r"FFMA ", r"FADD ", r"LDG\.E\S*\.128", r"STG\.E\S*\.128", r"LDS\.128")),
    # no static shared memory: the launcher passes what a kernel needs
    "segments": Limits(80, 0, (r"BAR\.SYNC", r"LDS", r"STS")),
}


class Kernel(NamedTuple):
    """One instantiation in one cubin."""

    name: str
    registers: int
    spills: int  # bytes, stores and loads
    shared: int
    sass: str


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    names = [os.environ.get("CUDACXX", ""), "nvcc", *(os.path.join(home, "bin", "nvcc") for home in homes if home)]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def find_cuobjdump(nvcc: str) -> str | None:
    """Beside nvcc, on PATH or in the triton wheel."""
    triton = importlib.util.find_spec("triton")
    inside = Path(str(triton.origin)).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    names = [str(Path(nvcc).with_name("cuobjdump")), "cuobjdump", *([str(inside)] if inside else [])]
    return next((found for name in names if (found := shutil.which(name))), None)


NVCC = find_nvcc()
CUOBJDUMP = find_cuobjdump(NVCC) if NVCC else None

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


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
        Kernel(name, int(registers), int(stores) + int(loads), int(shared or 0), sass.get(name, ""))
        for name, stores, loads, registers, shared in found
    ]


def sass_of(cubin: Path) -> dict[str, str]:
    if CUOBJDUMP is None:
        return {}
    listing = subprocess.run([CUOBJDUMP, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : ", listing)[1:]
    return {function.split("\n", 1)[0].strip(): function for function in functions}


def readable(name: str) -> str:
    """From a mangled name: "merge bf16 + fp32" for the weight's dtype and the adapter's, "segments int64 1024"."""
    match = re.search(r"(segments|sort|scan|scatter)_kernel(?:I([il])(?:Li(\d+)E)?E)?", name)
    if match is not None:
        return " ".join(filter(None, (match[1], {"i": "int32", "l": "int64"}.get(match[2], ""), match[3])))
    types = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
    match = re.search(r"merge_kernelI(f|6__half|13__nv_bfloat16)(f|6__half|13__nv_bfloat16|S\d_)Lb([01])", name)
    if match is None:
        return name
    weight, adapter = types[match[1]], types.get(match[2], types[match[1]])  # S3_: the same once more
    return f"{'unmerge' if match[3] == '1' else 'merge'} {weight} + {adapter}"


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Kernel]]:
    """The kernels of every .cu file for every architecture that this nvcc knows."""
    listed = subprocess.run([str(NVCC), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    folder = tmp_path_factory.mktemp("cubins")
    jobs = [
        (source, arch) for source in sorted(ROOT.glob("csrc/cuda/*.cu")) for arch in ARCHS if f"sm_{arch}" in listed
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = pool.map(lambda job: compile_kernels(*job, folder), jobs)
        return {(source.stem, arch): found for (source, arch), found in zip(jobs, kernels, strict=True)}


def test_registers_spills_and_shared_memory(
    cubins: dict[tuple[str, str], list[Kernel]], capsys: pytest.CaptureFixture[str]
) -> None:
    used: dict[str, dict[str, int]] = {}
    for (stem, arch), kernels in cubins.items():
        for kernel in kernels:
            where = f"{readable(kernel.name)}, sm_{arch}"
            assert kernel.spills == 0, f"{where}: {kernel.spills} bytes spilled"
            assert kernel.registers <= LIMITS[stem].registers, f"{where}: {kernel.registers} registers"
            assert kernel.shared <= LIMITS[stem].shared, f"{where}: {kernel.shared} bytes of shared memory"
            used.setdefault(readable(kernel.name), {})[arch] = kernel.registers
    archs = sorted({arch for _, arch in cubins}, key=int)
    lines = [f"  {'registers':<24}" + "".join(f"  sm_{arch:<5}" for arch in archs)]
    for name in sorted(used):
        lines.append(f"  {name:<24}" + "".join(f"  {used[name].get(arch, ''):<8}" for arch in archs))
    with capsys.disabled():
        print("", *lines, sep="\n")


@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump, of the CUDA toolkit or the triton wheel")
def test_instructions(cubins: dict[tuple[str, str], list[Kernel]]) -> None:
    for (stem, arch), kernels in cubins.items():
        for kernel in kernels:
            where = f"{readable(kernel.name)}, sm_{arch}"
            for instruction in LIMITS[stem].instructions:
                assert re.search(instruction, kernel.sass), f"{where}: no {instruction}"
            flushing = re.search(r"\bF(?:ADD|MUL|FMA)\S*\.FTZ", kernel.sass)
            assert flushing is None, f"{where}: {flushing and flushing[0]} flushes denormals"


@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump, of the CUDA toolkit or the triton wheel")
def test_merge_rounds_what_it_must_round(cubins: dict[tuple[str, str], list[Kernel]]) -> None:
    """s·t, the sum of d over adapters, W + d and W' - d are roundings of their own: for each of a thread's 32 outputs
    one FMUL and three FADD in merge, two FADD in unmerge. Fewer would mean a contraction."""
    for (stem, arch), kernels in cubins.items():
        for kernel in kernels if stem == "merge" else []:
            sums = 2 if readable(kernel.name).startswith("unmerge") else 3
            where = f"{readable(kernel.name)}, sm_{arch}"
            assert operations("FMUL", kernel.sass) >= 32, where  # more where the first adapter has code of its own
            assert operations("FADD", kernel.sass) == 32 * sums, where


def operations(name: str, sass: str) -> int:
    """How many of them; FADD2 and its like make two."""
    return len(re.findall(rf"\b{name}\b", sass)) + 2 * len(re.findall(rf"\b{name}2\b", sass))


@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump, of the CUDA toolkit or the triton wheel")
def test_segments_sort_by_shuffles_and_number_by_votes(cubins: dict[tuple[str, str], list[Kernel]]) -> None:
    """A few times as many shuffles as a thread has keys: the sort's loops are not unrolled."""
    for (stem, arch), kernels in cubins.items():
        for kernel in kernels if stem == "segments" else []:
            name, _, size = (readable(kernel.name) + "  ").split(" ")[:3]
            where = f"{readable(kernel.name)}, sm_{arch}"
            shuffles = operations(r"SHFL\.BFLY", kernel.sass)
            assert bool(shuffles) == (name in ("segments", "sort")), where
            assert shuffles <= (6 if size == "64" else 24), f"{where}: {shuffles} shuffles"
            if name in ("segments", "scatter"):
                assert re.search(r"VOTE\S*", kernel.sass), where
                assert re.search(r"POPC", kernel.sass), where
