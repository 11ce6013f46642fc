"""Exact merge and unmerge: the reference against libm's fma, every CPU level against the reference, 100 cycles."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import random

import pytest
import torch
from torch import Tensor

import peftk.functional as functional
import peftk.reference as reference
from peftk import _cpu
from peftk.backends import Call, cpu
from peftk.reference.merge import RAW, ZERO
from tests.merge_cases import DTYPES, MergeCase, merge_case, same_bits

LEVELS = _cpu.simd_levels()
# N, K, R: single elements, ragged edges of every tile, ranks of every kind
SHAPES = [(1, 1, 1), (2, 3, 2), (7, 63, 5), (24, 64, 16), (25, 129, 17), (50, 200, 8), (13, 70, 300)]


def merged_by(backend: object, case: MergeCase) -> tuple[Tensor, Tensor]:
    return backend.merge(case.weight, case.lora_A, case.lora_B, case.scaling)  # type: ignore[attr-defined]


def check_against_reference(case: MergeCase) -> None:
    merged, code = merged_by(cpu, case)
    expected, expected_code = merged_by(reference, case)
    assert same_bits(merged, expected), f"{case}"
    assert torch.equal(code, expected_code), f"{case}"
    back = cpu.unmerge(merged, case.lora_A, case.lora_B, case.scaling, code)
    assert same_bits(back, reference.unmerge(expected, case.lora_A, case.lora_B, case.scaling, code)), f"{case}"
    keep = code != RAW
    assert same_bits(back[keep], case.weight[keep]), f"{case}"


def test_the_reference_against_libm() -> None:
    """The same chain by the C library's fmaf, one element after another."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.restype = ctypes.c_float
    libm.fmaf.argtypes = [ctypes.c_float] * 3
    rng = random.Random(0)
    for dtype, size in itertools.product(DTYPES, (0.01, 3.0)):
        case = merge_case(rng.randrange(1000), 9, 31, 20, torch.float32, dtype, size=size, padding=0)
        merged, _ = merged_by(reference, case.with_weight(torch.full((9, 31), -0.0)))
        for n, j in itertools.product(range(9), range(31)):
            t = 0.0
            for r in range(20):
                t = libm.fmaf(float(case.lora_B[n, r]), float(case.lora_A[r, j]), t)
            d = torch.tensor(t) * torch.tensor(case.scaling)
            assert same_bits(merged[n, j], torch.tensor(-0.0) + d)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
def test_bits_of_the_reference(level: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    for seed, (shape, size, padding) in enumerate(itertools.product(SHAPES, (0.01, 3.0), (0, 5))):
        check_against_reference(merge_case(seed, *shape, dtype, adapter_dtype, size=size, padding=padding))


@pytest.mark.full
def test_bits_of_the_reference_in_random_cases(level: str) -> None:
    rng = random.Random(7)
    for seed in range(300):
        shape = rng.randint(1, 80), rng.randint(1, 300), rng.choice([1, 2, 4, 8, 16, rng.randint(1, 300)])
        size, padding = rng.choice([1e-6, 0.01, 1.0, 1e4]), rng.choice([0, 1, 64])
        check_against_reference(
            merge_case(seed, *shape, rng.choice(DTYPES), rng.choice(DTYPES), size=size, padding=padding)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_and_not_a_number(level: str, dtype: torch.dtype) -> None:
    """What the kernels give where the caller will refuse: infinities and NaNs as IEEE has them."""
    case = merge_case(3, 40, 70, 6, dtype, torch.float32, size=1.0, padding=0)
    case.lora_B[::3] = 3e38
    case.lora_A[:, ::5] = float("inf")
    case.weight[::4, ::3] = float("nan")
    case.weight[1::4, ::3] = float("-inf")
    merged, _ = merged_by(cpu, case)
    assert same_bits(merged, merged_by(reference, case)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_of_every_half_way_case(level: str, dtype: torch.dtype) -> None:
    """W' = round(W + d) over all 16-bit patterns of W, with d that fall on and beside ties."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = patterns.view(torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype).reshape(256, 256)
    B = weight.float().nan_to_num(0.0, 0.0, 0.0)[:, :1] * torch.tensor([[2.0**-9, 2.0**-12, 2.0**-24]])
    A = torch.tensor([[1.0], [-1.0], [0.5]]) * torch.randint(-3, 4, (3, 256), generator=torch.manual_seed(0))
    case = MergeCase(weight, A.contiguous(), B.contiguous(), 1.0)
    merged, code = merged_by(cpu, case)
    expected, expected_code = merged_by(reference, case)
    finite = weight.isfinite()
    assert same_bits(merged, expected)
    assert torch.equal(code[finite], expected_code[finite])


def test_factors_of_two_dtypes_and_any_strides() -> None:
    case = merge_case(1, 30, 50, 9, torch.bfloat16, torch.float32, size=1.0, padding=3)
    case.lora_A = case.lora_A.bfloat16()
    case.lora_B = case.lora_B.t().contiguous().t()
    check_against_reference(case)
    check_against_reference(case.with_weight(case.weight.t().contiguous().t()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(level: str, dtype: torch.dtype) -> None:
    """The kernels may write over what they read."""
    case = merge_case(11, 50, 150, 12, dtype, torch.float32, size=1.0, padding=0)
    expected, expected_code = merged_by(reference, case)
    weight, code = case.weight.contiguous().clone(), torch.empty(50, 150, dtype=torch.int8)
    cpu._merge(_cpu.merge, weight, weight, case.lora_A, case.lora_B, case.scaling, code)
    assert same_bits(weight, expected)
    assert torch.equal(code, expected_code)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_any_number_of_threads(threads: None, dtype: torch.dtype) -> None:
    case = merge_case(5, 190, 700, 33, dtype, torch.float32, size=1.0, padding=0)
    torch.set_num_threads(1)
    merged, code = merged_by(cpu, case)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        again, code_again = merged_by(cpu, case)
        assert same_bits(again, merged)
        assert torch.equal(code_again, code)


def test_denormals_whatever_mode_torch_has_set(level: str, threads: None) -> None:
    """torch.set_flush_denormal changes the calling thread; the kernels keep denormals and give the mode back."""
    case = merge_case(2, 190, 700, 16, torch.float32, torch.float32, size=1.0, padding=0)
    case.weight *= 1e-38
    case.lora_B *= 1e-38
    expected, expected_code = merged_by(reference, case)
    assert int(((expected != 0) & (expected.abs() < torch.finfo(torch.float32).tiny)).sum()) > 1000
    torch.set_num_threads(4)
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush denormals on this processor")
    try:
        merged, code = merged_by(cpu, case)
        still_flushing = float(torch.tensor(1e-38) * torch.tensor(0.01)) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(merged, expected)
    assert torch.equal(code, expected_code)
    assert still_flushing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distribution_of_the_code(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    """One byte is enough for nearly all weights, however large ΔW is beside W."""
    generator = torch.Generator().manual_seed(0)
    N, K, R = 512, 1024, 16
    weight = torch.randn(N, K, generator=generator).to(dtype)
    A = torch.randn(R, K, generator=generator) / R**0.5
    lines = []
    for size, most_raw in ((0.025, 1e-4), (0.25, 1e-3), (2.5, 1e-2)):
        B = torch.randn(N, R, generator=generator) * size
        _, code = cpu.merge(weight, A, B, 1.0)
        distance = code.int().abs()
        zero, beyond_7 = float((code == 0).float().mean()), float(((distance > 7) & (code != ZERO)).float().mean())
        raw = float((code == RAW).float().mean())
        lines.append(f"  {dtype} |ΔW|/|W| {size:<5}: 0 {zero:7.2%}, beyond ±7 {beyond_7:8.3%}, raw {raw:8.4%}")
        assert raw <= most_raw
    with capsys.disabled():
        print("", *lines, sep="\n")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_100_cycles_leave_every_bit(dtype: torch.dtype) -> None:
    case = merge_case(4, 60, 90, 16, dtype, torch.float32, size=1.0, padding=0)
    # `size` 1 beside weights near the largest number: keep W' finite
    case.weight.clamp_(-torch.finfo(dtype).max / 8, torch.finfo(dtype).max / 8)
    weight = case.weight.clone()
    for cycle in range(100):
        receipt = functional.merge_(weight, case.lora_A, case.lora_B, 1.0 + cycle)
        assert not same_bits(weight, case.weight)
        functional.unmerge_(weight, receipt)
        assert same_bits(weight, case.weight)


def test_a_merge_on_one_backend_is_undone_on_another() -> None:
    case = merge_case(6, 40, 70, 16, torch.bfloat16, torch.float32, size=0.5, padding=0)
    case.weight.clamp_(-1e4, 1e4)
    for first, second in itertools.permutations(("reference", "cpu")):
        weight = case.weight.clone()
        receipt = functional.merge_(weight, case.lora_A, case.lora_B, 2.0, backend=first)
        functional.unmerge_(weight, receipt, backend=second)
        assert same_bits(weight, case.weight)


def test_a_merge_that_would_not_be_finite_is_refused_and_changes_nothing() -> None:
    case = merge_case(8, 20, 30, 4, torch.float16, torch.float32, size=1.0, padding=0)
    for bad in (1e30, float("inf"), float("nan")):
        lora_B = case.lora_B.clone()
        lora_B[3, 1] = bad
        weight = case.weight.clone()
        with pytest.raises(ValueError, match="finite"):
            functional.merge_(weight, case.lora_A, lora_B, 1.0)
        assert same_bits(weight, case.weight)


def test_unmerge_refuses_what_the_merge_did_not_leave() -> None:
    case = merge_case(9, 20, 30, 4, torch.float32, torch.float32, size=1.0, padding=0)
    case.weight.clamp_(-1e4, 1e4)
    weight = case.weight.clone()
    receipt = functional.merge_(weight, case.lora_A, case.lora_B, 1.0)
    merged = weight.clone()

    changed = merged.clone()
    changed[7, 5] = changed[7, 5].nextafter(torch.tensor(torch.inf))
    swapped = merged[torch.tensor([1, 0, *range(2, 20)])].contiguous()
    for wrong in (changed, swapped, merged[:10].clone(), merged.bfloat16(), case.weight.clone()):
        before = wrong.clone()
        with pytest.raises(ValueError, match="weight"):
            functional.unmerge_(wrong, receipt)
        assert same_bits(wrong, before)
    with pytest.raises(TypeError, match="receipt"):
        functional.unmerge_(weight, "receipt")  # type: ignore[arg-type]
    functional.unmerge_(weight, receipt)
    assert same_bits(weight, case.weight)


def test_the_receipt_needs_neither_the_factors_nor_the_scaling() -> None:
    case = merge_case(10, 20, 30, 4, torch.bfloat16, torch.float32, size=1.0, padding=0)
    case.weight.clamp_(-1e4, 1e4)
    weight = case.weight.clone()
    receipt = functional.merge_(weight, case.lora_A, case.lora_B, 1.0)
    case.lora_A.zero_()
    case.lora_B.fill_(float("nan"))
    functional.unmerge_(weight, receipt)
    assert same_bits(weight, case.weight)


def test_the_cuda_backend_says_what_it_cannot_serve() -> None:
    cuda = pytest.importorskip("peftk.backends.cuda", reason="needs peftk._cuda, which nvcc builds")

    def call(op: str, device: str, dtype: torch.dtype) -> Call:
        return Call(op, device, dtype, dtype, torch.float32, 8, 8, 8, 4, 1)

    assert cuda.cannot_serve(call("merge", "cuda", torch.bfloat16)) is None
    assert "lora_linear" in cuda.cannot_serve(call("lora_linear", "cuda", torch.bfloat16))
    assert "cpu" in cuda.cannot_serve(call("unmerge", "cpu", torch.bfloat16))
    assert "float64" in cuda.cannot_serve(call("merge", "cuda", torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
def test_bits_of_the_reference_on_a_gpu(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    from peftk.backends import cuda

    for seed, (shape, size, padding) in enumerate(itertools.product(SHAPES, (0.01, 3.0), (0, 5))):
        case = merge_case(seed, *shape, dtype, adapter_dtype, size=size, padding=padding)
        expected, expected_code = merged_by(reference, case)
        on_gpu = MergeCase(case.weight.cuda(), case.lora_A.cuda(), case.lora_B.cuda(), case.scaling)
        merged, code = merged_by(cuda, on_gpu)
        assert same_bits(merged.cpu(), expected), f"{case}"
        assert torch.equal(code.cpu(), expected_code), f"{case}"
        back = cuda.unmerge(merged, on_gpu.lora_A, on_gpu.lora_B, case.scaling, code)
        keep = code.cpu() != RAW
        assert same_bits(back.cpu()[keep], case.weight[keep]), f"{case}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_inspect_is_the_references(level: str, dtype: torch.dtype) -> None:
    for N, K in ((1, 1), (3, 5), (33, 40), (67, 129)):
        weight = torch.randn(N, K + 3).to(dtype)[:, :K]
        assert cpu.inspect(weight) == reference.inspect(weight)
        changed = weight.clone()
        changed[N // 2, K - 1] = -changed[N // 2, K - 1]
        assert cpu.inspect(changed)[0] != cpu.inspect(weight)[0]
        for poison in (float("inf"), float("-inf"), float("nan")):
            changed[0, K // 2] = poison
            assert cpu.inspect(changed) == reference.inspect(changed)
            assert not cpu.inspect(changed)[1]
