"""Exact merge and unmerge: the reference against libm's fma, every SIMD level against the reference, 100 cycles."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import random
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

import peftk.functional as functional
from peftk import _cpu
from peftk.backends import cpu, reference
from peftk.backends import reference as reference_backend
from peftk.reference.merge import RAW, ZERO, Factors
from peftk.reference.merge import factors as adapters
from peftk.reference.receipt import MergeReceipt, code_as_bytes
from tests.support.calls import call
from tests.support.merge_cases import DTYPES, check_receipt, merge_case, same_bits, several
from tests.support.tiers import spread

LEVELS = _cpu.simd_levels()
# N, K, R: single elements, partial tiles at every edge, ranks of every kind
SHAPES = [(1, 1, 1), (2, 3, 2), (7, 63, 5), (24, 64, 16), (25, 129, 17), (50, 200, 8), (13, 70, 300)]


def cpu_merge(weight: Tensor, factors: Factors) -> tuple[Tensor, Tensor, MergeReceipt]:
    """Merges a copy of W with W's strides: W', the code with one byte per weight, and the receipt."""
    merged = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype).copy_(weight)
    receipt = cpu.merge_(merged, factors)
    return merged, code_as_bytes(receipt)[0], receipt


def check_against_reference(weight: Tensor, factors: Factors, note: object = "") -> None:
    """merge_ and unmerge_ give the reference's bits and its receipt."""
    merged, code, receipt = cpu_merge(weight, factors)
    expected = weight.clone()
    theirs = reference_backend.merge_(expected, factors)
    assert same_bits(merged, expected), f"{note}"
    assert torch.equal(code, reference.merge(weight, factors)[1]), f"{note}"
    check_receipt(receipt, theirs)
    cpu.unmerge_(merged, receipt)
    assert same_bits(merged, weight), f"{note}"


def test_the_reference_against_libm() -> None:
    """The same chain of fmas, element by element, with the C library's fmaf."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.restype = ctypes.c_float
    libm.fmaf.argtypes = [ctypes.c_float] * 3
    rng = random.Random(0)
    for dtype, size in itertools.product(DTYPES, (0.01, 3.0)):
        case = merge_case(rng.randrange(1000), 9, 31, 20, torch.float32, dtype, size=size, padding=0)
        merged, _ = reference.merge(torch.full((9, 31), -0.0), case.factors)
        for n, j in itertools.product(range(9), range(31)):
            t = 0.0
            for r in range(20):
                t = libm.fmaf(float(case.lora_B[n, r]), float(case.lora_A[r, j]), t)
            d = torch.tensor(t) * torch.tensor(case.scaling)
            assert same_bits(merged[n, j], torch.tensor(-0.0) + d)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), spread(itertools.product(DTYPES, DTYPES), default=3), ids=str)
def test_bits_of_the_reference(level: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    for seed, (shape, size, padding) in enumerate(itertools.product(SHAPES, (0.01, 3.0), (0, 5))):
        case = merge_case(seed, *shape, dtype, adapter_dtype, size=size, padding=padding)
        check_against_reference(case.weight, case.factors, case)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), spread(itertools.product(DTYPES, DTYPES), default=3), ids=str)
def test_several_adapters_at_once(level: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    for seed, ranks in enumerate([(1, 1), (5, 16, 3), (7,) * 9, (130, 1)]):
        weight = merge_case(seed, 31, 530, 1, dtype, torch.float32, size=1.0, padding=seed % 3).weight
        factors = several(seed, weight, ranks, 0.5, adapter_dtype)
        check_against_reference(weight, factors, ranks)


def test_adding_adapters_starts_from_the_first_one(level: str) -> None:
    """If the only product is -0, d is -0 and W = -0 keeps its sign; a sum that starts at +0 would give +0."""
    A, B = torch.full((2, 40), 1.0), torch.full((7, 2), 2.0**-149)
    factors = adapters([A[:1], A[1:]], [B[:, :1], B[:, 1:]], [-0.25, -0.25])
    weight = torch.full((7, 40), -0.0)
    merged, _, _ = cpu_merge(weight, factors)
    assert bool(merged.signbit().all())
    assert same_bits(merged, reference.merge(weight, factors)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_one_merge_to_another(level: str, dtype: torch.dtype) -> None:
    """remerge_ gives the bits and the receipt of unmerge_ followed by merge_."""
    for seed, (shape, ranks) in enumerate(itertools.product([(1, 1), (53, 1100)], [(4,), (9, 1)])):
        weight = merge_case(seed, *shape, 1, dtype, torch.float32, size=1.0, padding=seed % 2).weight
        first, second = (several(seed + i, weight, ranks[: 2 - i], 3.0, torch.float32) for i in range(2))
        merged, _, receipt = cpu_merge(weight, first)
        assert shape == (1, 1) or len(receipt.raw_values) > 20
        again = cpu.remerge_(merged, receipt, second)
        expected, _, expected_receipt = cpu_merge(weight, second)
        assert same_bits(merged, expected)
        check_receipt(again, expected_receipt)
        cpu.unmerge_(merged, again)
        assert same_bits(merged, weight)


def test_nobody_sees_the_base_layer_between_two_merges() -> None:
    """Not even a thread that reads W meanwhile: each weight is as it was merged before, or as it is now."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(384, 2048, generator=generator)
    first, second = (
        (torch.randn(8, 2048, generator=generator), torch.randn(384, 8, generator=generator), 1.0) for _ in range(2)
    )
    base = weight.clone()
    receipt = functional.merge_(weight, *first, backend="cpu")
    merged = [weight.clone()]
    receipt = functional.remerge_(weight, receipt, *second, backend="cpu")
    merged.append(weight.clone())
    seen, ended = [], threading.Event()

    def look() -> None:
        while not ended.is_set():
            now = weight.clone()
            seen.append(int(((now == base) & (now != merged[0]) & (now != merged[1])).sum()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        while len(seen) < 40 and thread.is_alive():
            for factors in (first, second):
                receipt = functional.remerge_(weight, receipt, *factors, backend="cpu")
    finally:
        ended.set()
        thread.join()
    assert not any(seen)


@pytest.mark.full
def test_bits_of_the_reference_in_random_cases(level: str) -> None:
    rng = random.Random(7)
    for seed in range(300):
        shape = rng.randint(1, 80), rng.randint(1, 300), rng.choice([1, 2, 4, 8, 16, rng.randint(1, 300)])
        size, padding = rng.choice([1e-6, 0.01, 1.0, 100.0]), rng.choice([0, 1, 64])
        case = merge_case(seed, *shape, rng.choice(DTYPES), rng.choice(DTYPES), size=size, padding=padding)
        # at the largest `size` the largest weights would overflow
        case.weight.clamp_(-torch.finfo(case.weight.dtype).max / 8, torch.finfo(case.weight.dtype).max / 8)
        check_against_reference(case.weight, case.factors, case)


POISONS = ("inf in B", "NaN in A", "huge A", "inf in W", "NaN in W", "largest NaN in W", "half an ulp below overflow")


def poisoned(poison: str, weight: Tensor, place: tuple[int, int], seed: int) -> tuple[Tensor, Factors]:
    """W and adapters whose W' is not finite in exactly one element, at `place`."""
    n, j = place
    case = merge_case(seed, *weight.shape, 5, weight.dtype, torch.float32, size=1.0, padding=0)
    A, B, bad = case.lora_A, case.lora_B, weight.clone()
    A[:, j], B[n] = 1.0, 0.25
    if poison == "inf in B":
        B[n, 2] = float("inf")
    elif poison == "NaN in A":
        A[4, j] = float("nan")
    elif poison == "huge A":
        A[:, j] = B[n] = 3e38
    elif poison == "half an ulp below overflow":  # the smallest sum that rounds to inf
        largest = torch.finfo(weight.dtype).max
        bad[n, j], A[:, j], B[n] = largest, 0.0, 0.0
        A[0, j], B[n, 0] = 2.0**64, ulp_of(largest, weight.dtype) / 2.0**65
    elif poison == "largest NaN in W":
        bits = bad.view({2: torch.int16, 4: torch.int32}[bad.element_size()])
        bits[n, j] = torch.iinfo(bits.dtype).max
    else:
        bad[n, j] = float("inf" if poison == "inf in W" else "nan")
    return bad, adapters([A], [B], [1.0])


def ulp_of(largest: float, dtype: torch.dtype) -> float:
    """The distance from the largest number to the one before it."""
    return largest - float(torch.tensor(largest, dtype=dtype).nextafter(torch.tensor(0.0, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [(0, 0), (59, 1099), (30, 600)], ids=["first", "last", "middle"])
def test_what_is_not_finite_is_refused_and_undone(
    level: str, threads: None, dtype: torch.dtype, place: tuple[int, int]
) -> None:
    """Blocks merged before the bad element get back their bits, wherever it is; also when remerging."""
    clean = merge_case(3, 60, 1100, 1, dtype, torch.float32, size=1.0, padding=0).weight
    clean[clean.abs() > 1e3] = 1.0
    first = several(9, clean, (3, 4), 3.0, torch.float32)
    merged, _, receipt = cpu_merge(clean, first)
    assert len(receipt.raw_values) > 20
    for poison, count in itertools.product(POISONS, (1, 3)):
        torch.set_num_threads(count)
        weight, factors = poisoned(poison, clean, place, 5)
        before = weight.clone()
        with pytest.raises(ValueError, match="finite"):
            cpu.merge_(weight, factors)
        assert same_raw_bits(weight, before), poison
        if "W" in poison or poison.startswith("half"):
            continue  # a remerge starts from a weight that could be merged
        again = merged.clone()
        with pytest.raises(ValueError, match="finite"):
            cpu.remerge_(again, receipt, factors)
        assert same_raw_bits(again, merged), poison
        cpu.unmerge_(again, receipt)
        assert same_raw_bits(again, clean)


def same_raw_bits(a: Tensor, b: Tensor) -> bool:
    """Like same_bits, but compares the bits of NaNs too."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(integer), b.view(integer))


def test_the_largest_finite_number_is_not_refused(level: str) -> None:
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max
        weight = torch.full((5, 70), largest, dtype=dtype)
        A = torch.full((1, 70), 2.0**64)
        B = torch.full((5, 1), ulp_of(largest, dtype) * 0.49 / 2.0**64)
        check_against_reference(weight, adapters([A], [B], [1.0]), dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_a_merge_that_runs_out_of_memory_changes_nothing() -> None:
    """Raw weights need memory while W is being written. If there is none, W is restored."""
    script = """
import resource, torch
from peftk import functional
W = torch.randn(2000, 3000)
W[0] = 1.0
A, B = torch.randn(4, 3000), torch.randn(2000, 4) * 1e4   # nearly every weight is raw
torch.set_num_threads(1)
functional.merge_(torch.randn(30, 3000), A, B[:30])  # warm: this thread has its scratch
before = W.clone()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
most = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), most))  # 6 MB for the code, the rest for raw weights
try:
    functional.merge_(W, A, B)
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    assert torch.equal(W.view(torch.int32), before.view(torch.int32))
    print("refused, unchanged")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "refused, unchanged" in done.stdout, done.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_of_every_half_way_case(level: str, dtype: torch.dtype) -> None:
    """W' = round(W + d) for all 16-bit patterns of W, with d on and next to ties."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = patterns.view(torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype).reshape(256, 256)
    B = weight.float().nan_to_num(0.0, 0.0, 0.0)[:, :1] * torch.tensor([[2.0**-9, 2.0**-12, 2.0**-24]])
    A = torch.tensor([[1.0], [-1.0], [0.5]]) * torch.randint(-3, 4, (3, 256), generator=torch.manual_seed(0))
    factors = adapters([A], [B], [1.0])
    weight = torch.where(reference.merge(weight, factors)[0].isfinite(), weight, 1.0)
    check_against_reference(weight, factors)


def test_factors_of_two_dtypes_and_any_strides() -> None:
    case = merge_case(1, 30, 50, 9, torch.bfloat16, torch.float32, size=1.0, padding=3)
    case.lora_B = case.lora_B.t().contiguous().t()
    check_against_reference(case.weight, adapters([case.lora_A.bfloat16()], [case.lora_B], [1.5]))
    check_against_reference(case.weight.t().contiguous().t(), case.factors)
    check_against_reference(torch.empty(30, 101, dtype=torch.bfloat16)[:, ::2][:, :50].copy_(case.weight), case.factors)


def test_what_lies_between_the_rows_stays(level: str) -> None:
    for dtype in DTYPES:
        storage = torch.full((50, 160), 7.0, dtype=dtype)
        case = merge_case(11, 50, 150, 12, dtype, torch.float32, size=1.0, padding=0)
        weight = storage[:, 3:153].copy_(case.weight)
        receipt = cpu.merge_(weight, case.factors)
        assert bool((storage[:, :3] == 7).all() and (storage[:, 153:] == 7).all())
        cpu.unmerge_(weight, receipt)
        assert bool((storage[:, :3] == 7).all() and (storage[:, 153:] == 7).all())
        assert same_bits(weight, case.weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_any_number_of_threads(threads: None, dtype: torch.dtype) -> None:
    case = merge_case(5, 190, 700, 33, dtype, torch.float32, size=3.0, padding=0)
    torch.set_num_threads(1)
    merged, code, receipt = cpu_merge(case.weight, case.factors)
    assert len(receipt.raw_values) > 100
    for count in (2, 3, 5, 8):
        torch.set_num_threads(count)
        again, code_again, receipt_again = cpu_merge(case.weight, case.factors)
        assert same_bits(again, merged)
        assert torch.equal(code_again, code)
        check_receipt(receipt_again, receipt)
        cpu.unmerge_(again, receipt)
        assert same_bits(again, case.weight)


def test_denormals_whatever_mode_torch_has_set(level: str, threads: None) -> None:
    """torch.set_flush_denormal sets the mode of the calling thread; the kernels keep denormals and restore the mode."""
    case = merge_case(2, 190, 700, 16, torch.float32, torch.float32, size=1.0, padding=0)
    case.weight *= 1e-38
    case.lora_B *= 1e-38
    expected, expected_code = reference.merge(case.weight, case.factors)
    assert int(((expected != 0) & (expected.abs() < torch.finfo(torch.float32).tiny)).sum()) > 1000
    torch.set_num_threads(4)
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush denormals on this processor")
    try:
        merged, code, receipt = cpu_merge(case.weight, case.factors)
        back = merged.clone()
        cpu.unmerge_(back, receipt)
        still_flushing = float(torch.tensor(1e-38) * torch.tensor(0.01)) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(merged, expected)
    assert torch.equal(code, expected_code)
    assert same_bits(back, case.weight)
    assert still_flushing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distribution_of_the_code(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    """One byte is enough for nearly all weights, whatever the ratio of ΔW to W."""
    generator = torch.Generator().manual_seed(0)
    N, K, R = 512, 1024, 16
    weight = torch.randn(N, K, generator=generator).to(dtype)
    A = torch.randn(R, K, generator=generator) / R**0.5
    lines = []
    for size, most_raw in ((0.025, 1e-4), (0.25, 1e-3), (2.5, 1e-2)):
        B = torch.randn(N, R, generator=generator) * size
        _, code, _ = cpu_merge(weight, adapters([A], [B], [1.0]))
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
    # with `size` 1, weights near the largest number would overflow
    case.weight.clamp_(-torch.finfo(dtype).max / 8, torch.finfo(dtype).max / 8)
    weight = case.weight.clone()
    for cycle in range(100):
        receipt = functional.merge_(weight, case.lora_A, case.lora_B, 1.0 + cycle)
        assert not same_bits(weight, case.weight)
        functional.unmerge_(weight, receipt)
        assert same_bits(weight, case.weight)


@pytest.mark.parametrize("count", [1, 3])
def test_a_merge_on_one_backend_is_undone_on_another(count: int) -> None:
    case = merge_case(6, 40, 70, 16, torch.bfloat16, torch.float32, size=0.5, padding=0)
    case.weight.clamp_(-1e4, 1e4)
    A, B, s = [case.lora_A] * count, [case.lora_B] * count, [2.0, 0.5, -1.5][:count]
    for first, second, third in itertools.product(("reference", "cpu"), repeat=3):
        weight = case.weight.clone()
        receipt = functional.merge_(weight, A, B, s, backend=first)
        receipt = functional.remerge_(weight, receipt, case.lora_A, case.lora_B, 3.0, backend=second)
        functional.unmerge_(weight, receipt.to(torch.device("cpu")), backend=third)
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


def test_a_refused_remerge_leaves_the_old_merge() -> None:
    case = merge_case(8, 20, 30, 4, torch.float32, torch.float32, size=1.0, padding=0)
    case.weight.clamp_(-1e4, 1e4)
    for backend in ("cpu", "reference"):
        weight = case.weight.clone()
        receipt = functional.merge_(weight, case.lora_A, case.lora_B, 2.0, backend=backend)
        merged = weight.clone()
        with pytest.raises(ValueError, match="finite"):
            functional.remerge_(weight, receipt, case.lora_A, case.lora_B * float("inf"), backend=backend)
        assert same_bits(weight, merged)
        with pytest.raises(ValueError, match="the bits that the merge left"):
            functional.remerge_(case.weight.clone(), receipt, case.lora_A, case.lora_B, backend=backend)
        functional.unmerge_(weight, receipt, backend=backend)
        assert same_bits(weight, case.weight)


def layers_of(seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    cases = [
        merge_case(seed + i, 20 + i, 30 * (i + 1), 2 + i, DTYPES[i], torch.float32, size=0.1, padding=i)
        for i in range(3)
    ]
    for case in cases:
        case.weight.clamp_(-1e4, 1e4)
    return [case.weight for case in cases], [case.lora_A for case in cases], [case.lora_B for case in cases]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_list_of_layers_is_merged_or_none_of_them(backend: str) -> None:
    before, A, B = layers_of(20)
    weights = [weight.clone() for weight in before]
    receipts = functional.merge_layers_(weights, A, B, [1.0, 0.5, -2.0], backend=backend)
    for i, scaling in enumerate((1.0, 0.5, -2.0)):
        alone = before[i].clone()
        assert functional.merge_(alone, A[i], B[i], scaling).checksum == receipts[i].checksum
        assert same_bits(weights[i], alone)
    merged = [weight.clone() for weight in weights]
    weights[2][0, 0] += 1.0
    with pytest.raises(ValueError, match="layer 2: weight: expected the bits"):
        functional.unmerge_layers_(weights, receipts, backend=backend)
    assert all(same_bits(a, b) for a, b in zip(weights[:2], merged, strict=False))
    weights[2].copy_(merged[2])
    functional.unmerge_layers_(weights, receipts, backend=backend)
    B[2][1, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 2: weight: expected W"):
        functional.merge_layers_(weights, A, B, backend=backend)
    assert all(same_raw_bits(a.contiguous(), b.contiguous()) for a, b in zip(weights, before, strict=True))
    assert functional.merge_layers_([], [], []) == []


def test_what_a_list_of_layers_is_refused_for() -> None:
    weights, A, B = layers_of(20)
    before = [weight.clone() for weight in weights]
    whole = torch.ones(40, 30)
    for arguments, error, message in (
        ((weights, A[:2], B), ValueError, "lora_A: expected 3, as many as weights, got 2"),
        ((weights, A, B, [1.0]), ValueError, "scaling: expected 3"),
        ((weights[0], A, B), TypeError, "weights: expected a list or tuple"),
        ((weights, A, [B[0], B[0], B[2]]), ValueError, r"layer 1: lora_B: expected shape \[N, R\]"),
        (([weights[0], weights[0]], A[:1] * 2, B[:1] * 2), ValueError, "got layers 0 and 1 sharing memory"),
        (([whole[:20], whole[19:39]], A[:1] * 2, B[:1] * 2), ValueError, "got layers 0 and 1 sharing memory"),
    ):
        with pytest.raises(error, match=message):
            functional.merge_layers_(*arguments)  # type: ignore[arg-type]
    assert all(same_raw_bits(a.contiguous(), b.contiguous()) for a, b in zip(weights, before, strict=True))
    receipts = functional.merge_layers_([whole[:20], whole[20:]], A[:1] * 2, B[:1] * 2)  # adjacent memory, not shared
    with pytest.raises(TypeError, match="layer 1: receipt: expected"):
        functional.unmerge_layers_([whole[:20], whole[20:]], [receipts[0], None])  # type: ignore[list-item]


def test_a_list_that_fails_half_way_through_unmerging_stays_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, A, B = layers_of(30)
    receipts = functional.merge_layers_(weights, A, B)
    merged = [weight.clone() for weight in weights]
    unmerge = cpu.unmerge_

    def failing(weight: Tensor, receipt: MergeReceipt) -> None:
        if receipt is receipts[2]:
            raise MemoryError
        unmerge(weight, receipt)

    monkeypatch.setattr(cpu, "unmerge_", failing)
    with pytest.raises(MemoryError):
        functional.unmerge_layers_(weights, receipts)
    assert all(same_raw_bits(a.contiguous(), b.contiguous()) for a, b in zip(weights, merged, strict=True))


def test_what_merge_says_of_bad_factors() -> None:
    W, A, B = torch.ones(4, 6), torch.ones(2, 6), torch.ones(4, 2)
    receipt = functional.merge_(W.clone(), A, B)
    for lora_A, lora_B, scaling, error, message in (
        ([A], [B, B], 1.0, ValueError, "lora_B: expected 1, one for each adapter, got 2"),
        ([A, A], [B, B], [1.0], ValueError, "scaling: expected 2, one for each adapter, got 1"),
        ([], [], [], ValueError, "lora_A: expected 1 or more"),
        ([A], B, 1.0, TypeError, "lora_B: expected a list or tuple, one for each adapter, got Tensor"),
        (A, [B], 1.0, TypeError, "lora_A: expected a list or tuple"),
        ([A, A], [B, B[:3]], 1.0, ValueError, r"adapter 1: lora_B: expected shape \[N, R\] = \[4, 2\]"),
        ([A, A.double()], [B, B.double()], 1.0, TypeError, "adapter 1: lora_A: expected a dtype that mixes"),
        ([A, None], [B, None], 1.0, ValueError, "adapter 1: lora_A: expected a tensor"),
        ([A], [B], [float("nan")], ValueError, "adapter 0: scaling: expected a finite number"),
        (A, B, [1.0], TypeError, "scaling: expected a number, got list"),
        (None, None, 1.0, ValueError, "lora_A: expected a tensor"),
    ):
        weight = W.clone()
        with pytest.raises(error, match=message):
            functional.merge_(weight, lora_A, lora_B, scaling)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            functional.remerge_(weight, receipt, lora_A, lora_B, scaling)  # type: ignore[arg-type]
        assert same_bits(weight, W)
    with pytest.raises(TypeError, match="receipt: expected the MergeReceipt"):
        functional.remerge_(W, None, A, B)  # type: ignore[arg-type]


def test_a_graph_that_saved_the_weight_notices_a_merge() -> None:
    W, A, B = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)
    x = torch.randn(3, 6, requires_grad=True)
    y = functional.lora_linear(x, W)
    receipt = functional.merge_(W, A, B)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    functional.unmerge_(W, receipt)
    with torch.inference_mode():
        weight = torch.randn(4, 6)
        before = weight.clone()
        functional.unmerge_(weight, functional.merge_(weight, A, B))
        assert same_bits(weight, before)


def test_unmerge_refuses_what_the_merge_did_not_leave() -> None:
    case = merge_case(9, 20, 30, 4, torch.float32, torch.float32, size=1.0, padding=0)
    case.weight.clamp_(-1e4, 1e4)
    weight = case.weight.clone()
    receipt = functional.merge_(weight, case.lora_A, case.lora_B, 1.0)
    merged = weight.clone()

    changed = merged.clone()
    changed[7, 5] = changed[7, 5].nextafter(torch.tensor(torch.inf))
    swapped = merged[torch.tensor([1, 0, *range(2, 20)])].contiguous()
    for wrong in (changed, swapped, merged[:10].clone(), merged[0].clone(), merged.bfloat16(), case.weight.clone()):
        before = wrong.clone()
        with pytest.raises(ValueError, match="weight"):
            functional.unmerge_(wrong, receipt)
        assert same_bits(wrong, before)
    with pytest.raises(TypeError, match="weight: expected a dense"):
        functional.unmerge_(weight.to_sparse(), receipt)
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


def test_the_cuda_backend_says_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda = pytest.importorskip("peftk.backends.cuda", reason="needs peftk._cuda, which nvcc builds")

    def why(op: str, device: str, dtype: torch.dtype) -> str | None:
        return cuda.cannot_run(call(op, device=device, dtype=dtype, adapter_dtype=torch.float32))

    assert why("merge", "cuda", torch.bfloat16) is None
    assert "adapter_block" in str(why("adapter_block", "cuda", torch.bfloat16))
    assert "cpu" in str(why("unmerge", "cpu", torch.bfloat16))
    assert "float64" in str(why("merge", "cuda", torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
def test_bits_of_the_reference_on_a_gpu(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    from peftk.backends import cuda

    for seed, (shape, size, padding) in enumerate(itertools.product(SHAPES, (0.01, 3.0), (0, 5))):
        case = merge_case(seed, *shape, dtype, adapter_dtype, size=size, padding=padding)
        for factors in (case.factors, several(seed, case.weight, (3, shape[2]), size, adapter_dtype)):
            expected, weight = case.weight.clone(), case.weight.cuda()
            theirs = reference_backend.merge_(expected, factors)
            on_gpu = factors._replace(lora_A=factors.lora_A.cuda(), lora_B=factors.lora_B.cuda())
            receipt = cuda.merge_(weight, on_gpu)
            assert same_bits(weight.cpu(), expected), f"{case}"
            check_receipt(receipt.to(torch.device("cpu")), theirs)
            cuda.unmerge_(weight, receipt)
            assert same_bits(weight.cpu(), case.weight), f"{case}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_is_the_references(level: str, dtype: torch.dtype) -> None:
    for N, K in ((1, 1), (3, 5), (33, 40), (67, 129)):
        weight = torch.randn(N, K + 3).to(dtype)[:, :K]
        assert cpu.checksum(weight) == reference.checksum(weight)
        changed = weight.clone()
        changed[N // 2, K - 1] = -changed[N // 2, K - 1]
        assert cpu.checksum(changed) != cpu.checksum(weight)
        assert N == 1 or cpu.checksum(weight.roll(1, 0)) != cpu.checksum(weight)
        assert K == 1 or cpu.checksum(weight.roll(1, 1)) != cpu.checksum(weight)


def test_fp64_weights_are_merged_in_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, A, B = (torch.randn(*shape, generator=generator).double() / 3 for shape in ((9, 7), (4, 7), (9, 4)))
    expected = weight + 0.3 * (B @ A)
    functional.merge_(weight, A, B, 0.3)
    assert torch.allclose(weight, expected, rtol=0, atol=1e-15)
