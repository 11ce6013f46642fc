"""csrc/cuda/merge.cu itself, compiled by g++ through tests/cuda_on_host/ and run under the address and
undefined-behaviour sanitizers: the same bits as the reference, and mutants that are caught."""

from __future__ import annotations

import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftk import reference
from peftk.reference.merge import Factors
from tests.merge_cases import DTYPES, merge_case, same_bits, several

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc/cuda/merge.cu"
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    "-ffp-contract=off",  # as nvcc's --fmad=false
    "-fno-strict-aliasing",  # kernels read memory in vectors of another type, as nvcc allows
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class HostError(Exception):
    """The program ended early: a sanitizer's report, or the executor's own."""


def compile_host(folder: Path, source: str) -> Path:
    """The program of tests/cuda_on_host/merge.cpp around `source` in place of csrc/cuda/merge.cu."""
    (folder / "cuda").mkdir()
    (folder / "cuda/merge.cu").write_text(source)
    program = folder / "merge"
    includes = [f"-I{folder}", f"-I{ROOT / 'tests/cuda_on_host'}", f"-I{ROOT / 'csrc'}"]
    driver = ROOT / "tests/cuda_on_host/merge.cpp"
    subprocess.run(["g++", *FLAGS, *includes, str(driver), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_host(tmp_path_factory.mktemp("cuda_on_host"), SOURCE.read_text())


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


Call = tuple[Tensor, Factors, Tensor | None]


def run(program: Path, calls: list[Call], *, seed: int = 0, shift: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Merges each W, or with a code unmerges it (it is W' then). Returns (out [N, K], code [N, K]) for each."""
    request, sizes = b"", []
    for weight, (A, B, ends, scaling), code in calls:
        (N, K), stride = weight.shape, weight.stride(0)
        # from the first row to the end of the last: what lies between the rows comes along
        span = torch.as_strided(weight, ((N - 1) * stride + K,), (1,))
        dtypes = CODES[weight.dtype], CODES[A.dtype]
        header = (code is not None, N, K, A.shape[0], len(ends), stride, *dtypes, seed, shift)
        request += struct.pack("10q", *map(int, header)) + raw(span) + raw(A) + raw(B)
        request += raw(torch.zeros(N, K, dtype=torch.int8) if code is None else code)
        request += raw(torch.tensor(ends, dtype=torch.int64)) + raw(torch.tensor(scaling))
        sizes.append((N, K, stride, weight.dtype, len(raw(span))))
    answer = subprocess.run([str(program)], input=request, capture_output=True)
    if answer.returncode:
        raise HostError(answer.stderr.decode())
    results, rest = [], answer.stdout
    for N, K, stride, dtype, nbytes in sizes:
        out = torch.frombuffer(bytearray(rest[:nbytes]), dtype=dtype).as_strided((N, K), (stride, 1))
        code = torch.frombuffer(bytearray(rest[nbytes : nbytes + N * K]), dtype=torch.int8).reshape(N, K)
        results.append((out, code))
        rest = rest[nbytes + N * K :]
    assert not rest
    return results


SHAPES = [(1, 1, 1), (3, 5, 2), (64, 128, 16), (65, 131, 17), (130, 72, 40), (40, 264, 33)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
def test_bits_of_the_reference(program: Path, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    calls: list[Call] = []
    for seed, (shape, size, padding) in enumerate(itertools.product(SHAPES, (0.01, 3.0), (0, 8))):
        case = merge_case(seed, *shape, dtype, adapter_dtype, size=size, padding=padding)
        calls.append((case.weight, case.factors, None))
        calls.append((case.weight, several(seed, case.weight, (1, shape[2], 16), size, adapter_dtype), None))
    expected = [reference.merge(weight, factors) for weight, factors, _ in calls]
    for shift in (0, 1):  # vector accesses, then scalar ones
        merged = run(program, calls, seed=shift, shift=shift)
        for (weight, _, _), (out, code), (expected_out, expected_code) in zip(calls, merged, expected, strict=True):
            assert same_bits(out, expected_out), f"{weight.shape}"
            assert torch.equal(code, expected_code), f"{weight.shape}"
        again: list[Call] = [(out, call[1], code) for call, (out, code) in zip(calls, merged, strict=True)]
        for call, (weight, _) in zip(again, run(program, again, seed=shift + 2, shift=shift), strict=True):
            assert same_bits(weight, reference.unmerge(*call))


BARRIERS = {
    "no barrier before the chunk is read": (
        "                __syncthreads();\n                for (int r",
        "                for (int r",
    ),
    "no barrier before the chunk is overwritten": (
        "                __syncthreads();\n                rank",
        "                rank",
    ),
}
MUTANTS = {
    "ranks rounded up to a chunk": ("for (int r = 0; r < ranks; ++r)", "for (int r = 0; r < kChunk; ++r)"),
    "flushed denormals": ("S::round(__fadd_rn(widen(w), delta))", "S::round(flush(__fadd_rn(widen(w), delta)))"),
    "the first adapter added to zero": ("adapter == 0 ? share :", "adapter == 0 ? 0.0f + share :"),
    "a chunk that runs into the next adapter": ("int64_t(kChunk), end - rank", "int64_t(kChunk), factors.R - rank"),
    "one rounding fewer": (
        "adapter == 0 ? share : __fadd_rn(d[n][c], share)",
        "adapter == 0 ? share : __fmaf_rn(scaling, chain[n][c], d[n][c])",
    ),
}


def caught(folder: Path, before: str, after: str) -> str | None:
    """How a mutant of the kernel shows: the sanitizer's or executor's report, "wrong bits", or not at all."""
    source = SOURCE.read_text()
    assert source.count(before) == 1, "the mutant no longer finds its line"
    flush = "inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f * x : x; }"
    program = compile_host(
        folder, source.replace(before, after).replace("namespace {\n", f"namespace {{\n{flush}\n", 1)
    )
    calls: list[Call] = []
    for seed, (ranks, dtype) in enumerate(itertools.product(((3,), (40, 3)), (torch.float32, torch.bfloat16))):
        weight = merge_case(seed, 65, 131, 1, dtype, torch.float32, size=1.0, padding=0).weight
        calls.append((weight, several(seed, weight, ranks, 1.0, torch.float32), None))
    try:
        merged = run(program, calls)
    except HostError as error:
        return str(error)
    expected = [reference.merge(weight, factors) for weight, factors, _ in calls]
    right = all(same_bits(out, want) for (out, _), (want, _) in zip(merged, expected, strict=True))
    return None if right else "wrong bits"


@pytest.mark.parametrize("mutant", BARRIERS)
def test_a_missing_barrier_gives_wrong_bits(mutant: str, tmp_path: Path) -> None:
    assert caught(tmp_path, *BARRIERS[mutant]) == "wrong bits"


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_give_wrong_bits(mutant: str, tmp_path: Path) -> None:
    assert caught(tmp_path, *MUTANTS[mutant]) == "wrong bits"


@pytest.mark.full
def test_an_access_outside_is_reported(tmp_path: Path) -> None:
    report = caught(tmp_path, "c < valid) to[c]", "c <= valid) to[c]")
    assert report is not None
    assert "ERROR: AddressSanitizer" in report or "runtime error" in report


@pytest.mark.full
def test_a_barrier_in_a_branch_is_reported(tmp_path: Path) -> None:
    before = "                __syncthreads();\n                rank"
    report = caught(tmp_path, before, before.replace("__sync", "if (thread % 32) __sync"))
    assert report is not None
    assert "wait at" in report
