"""The Triton merge in the interpreter: W', code, raw weights, checksum and the unmerged W have the reference's bits."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

import peftk
from peftk import functional
from peftk.backends import choice, reference
from peftk.backends import reference as reference_backend
from peftk.backends import triton as backend
from peftk.ops import merge
from peftk.reference.merge import Factors
from peftk.reference.merge import factors as adapters
from peftk.reference.receipt import MergeReceipt
from peftk.triton_kernels import merge as kernels
from tests.support.calls import call
from tests.support.merge_cases import (
    DTYPES,
    FORMS,
    bits,
    check_failures_while_packing,
    check_forms_across_backends,
    check_receipt,
    check_refusal,
    copies,
    merge_case,
    same_bits,
    several,
)
from tests.support.tiers import spread

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LIST = [((1, 1), (1,)), ((50, 200), (8, 3)), ((33, 65), (5,)), ((40, 64), (1, 16, 2)), ((7, 128), (33,))]


def layers(
    dtype: torch.dtype, adapter_dtype: torch.dtype, seed: int = 0, size: float = 0.5
) -> tuple[list[Tensor], list[Factors]]:
    """Layers of different shapes, ranks and numbers of adapters; every other one has gaps between rows."""
    weights = [
        merge_case(seed + i, *shape, 1, dtype, F32, size=1.0, padding=3 * (i % 2)).weight
        for i, (shape, _) in enumerate(LIST)
    ]
    return weights, [
        several(seed + i, w, ranks, size, adapter_dtype)
        for i, (w, (_, ranks)) in enumerate(zip(weights, LIST, strict=True))
    ]


def check(weights: list[Tensor], factors: list[Factors]) -> list[MergeReceipt]:
    merged = copies(weights)
    receipts = backend.merge_layers_(merged, factors)
    for weight, side, new, receipt in zip(weights, factors, merged, receipts, strict=True):
        expected = weight.clone()
        theirs = reference_backend.merge_(expected, side)
        assert same_bits(new, expected)
        check_receipt(receipt, theirs)
    assert backend.checksums(merged) == [receipt.checksum for receipt in receipts]
    backend.unmerge_layers_(merged, receipts)
    for weight, new in zip(weights, merged, strict=True):
        assert torch.equal(bits(new), bits(weight))
    return receipts


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), spread(itertools.product(DTYPES, DTYPES), default=1, full=4), ids=str
)
def test_bits_of_the_reference_for_a_list_of_layers(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    receipts = check(*layers(dtype, adapter_dtype, size=3.0))
    assert sum(len(receipt.raw_values) for receipt in receipts) > 100


@pytest.mark.parametrize("seed", spread(range(60), default=0, full=10))
def test_random_cases(seed: int) -> None:
    rng = random.Random(seed)
    dtype, adapter_dtype = rng.choice(DTYPES), rng.choice(DTYPES)
    weights, factors = [], []
    for i in range(rng.randint(1, 4)):
        shape, size = (rng.randint(1, 80), rng.randint(1, 200)), rng.choice([1e-6, 0.01, 1.0, 100.0])
        weight = merge_case(seed + i, *shape, 1, dtype, F32, size=1.0, padding=rng.choice([0, 1, 64])).weight
        weights.append(weight.clamp_(-torch.finfo(dtype).max / 8, torch.finfo(dtype).max / 8))
        ranks = tuple(rng.choice([1, 2, 8, 16, rng.randint(1, 100)]) for _ in range(rng.randint(1, 3)))
        factors.append(several(seed + i, weight, ranks, size, adapter_dtype))
    check(weights, factors)


def test_minus_zero_stays() -> None:
    """d of products -0 is -0, and W = -0 stays. Chains padded with zeros, or a d that starts at +0, would lose it."""
    for ranks in ((1, 1), (3, 2), (5,)):
        total = sum(ranks)
        A, B = torch.full((total, 40), 1.0), torch.zeros(7, total)
        ends = list(itertools.accumulate(ranks))
        for end in ends:
            B[:, end - 1] = -(2.0**-149)
        A[:] = 0.25  # the last product of each chain rounds to -0, after sums of +0
        factors = adapters(
            [A[e - r : e] for e, r in zip(ends, ranks, strict=True)],
            [B[:, e - r : e] for e, r in zip(ends, ranks, strict=True)],
            [1.0] * len(ranks),
        )
        weight = torch.full((7, 40), -0.0)
        check([weight], [factors])
    A, B = torch.full((2, 40), 1.0), torch.full((7, 2), 2.0**-149)
    factors = adapters([A[:1], A[1:]], [B[:, :1], B[:, 1:]], [-0.25, -0.25])
    weight = torch.full((7, 40), -0.0)
    backend.merge_(weight, factors)
    assert bool(weight.signbit().all())


@pytest.mark.parametrize("dtype", [F16, pytest.param(BF16, marks=pytest.mark.full)], ids=str)
def test_every_pattern_of_16_bits(dtype: torch.dtype) -> None:
    """All of them, denormals included, are widened, rounded at and next to ties, and encoded."""
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    B = weight.float().nan_to_num(0.0, 0.0, 0.0)[:, :1] * torch.tensor([[2.0**-9, 2.0**-12, 2.0**-24]])
    A = torch.tensor([[1.0], [-1.0], [0.5]]) * torch.randint(-3, 4, (3, 256), generator=torch.manual_seed(0))
    factors = adapters([A], [B], [1.0])
    check([torch.where(reference.merge(weight, factors)[0].isfinite(), weight, 1.0)], [factors])


@pytest.mark.parametrize("count", [3, pytest.param(1, marks=pytest.mark.full)])
def test_undone_on_another_backend(count: int) -> None:
    case = merge_case(6, 40, 70, 5, BF16, F32, size=0.5, padding=0)
    case.weight.clamp_(-1e4, 1e4)
    A, B, s = [case.lora_A] * count, [case.lora_B] * count, [2.0, 0.5, -1.5][:count]
    for names in (("triton", "cpu", "triton"), ("cpu", "triton", "reference"), ("reference", "triton", "cpu")):
        weight = case.weight.clone()
        receipt = functional.merge_(weight, A, B, s, backend=names[0])
        receipt = functional.remerge_(weight, receipt, case.lora_A, case.lora_B, 3.0, backend=names[1])
        functional.unmerge_(weight, receipt, backend=names[2])
        assert torch.equal(bits(weight), bits(case.weight))


POISONS = list(zip(DTYPES, (float("inf"), float("nan"), 3e38), strict=True))


@pytest.mark.parametrize(("last", "poison"), spread(itertools.product((True, False), POISONS), default=1, full=5))
def test_what_is_not_finite_is_refused_and_nothing_has_changed(last: bool, poison: tuple[torch.dtype, float]) -> None:
    """At any place in the list: layers and tiles that were merged before it are restored."""
    dtype, bad = poison
    check_refusal(backend, *layers(dtype, F32, size=3.0), bad, 3 if last else 1, last=last)


@pytest.mark.full
def test_any_failure_leaves_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    check_failures_while_packing(backend, *layers(F32, F32, size=3.0), monkeypatch)


@pytest.mark.parametrize("ratio", FORMS)
def test_receipts_of_every_form_on_another_backend(ratio: float) -> None:
    check_forms_across_backends("triton", ratio)


def test_more_raw_weights_than_there_is_room_for() -> None:
    """Nearly every weight is raw: a second launch merges the tiles for which there was no room."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(90, 200, generator=generator)
    A, B = torch.randn(4, 200, generator=generator), torch.randn(90, 4, generator=generator) * 1e4
    launches = []

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> object:
            launches.append(grid)
            return merge_kernel[grid]

    merge_kernel = kernels.merge_kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "merge_kernel", Counted())
        (receipt,) = check([weight], [adapters([A], [B], [1.0])])
        assert len(receipt.raw_values) > 16_000
        assert len(launches) == 2
        launches.clear()
        check([weight], [adapters([A], [B * 1e-6], [1.0])])
        assert len(launches) == 1
    bad = B.clone()
    bad[-1] = float("inf")
    merged = weight.clone()
    with pytest.raises(ValueError, match="finite"):
        backend.merge_(merged, adapters([A], [bad], [1.0]))
    assert torch.equal(merged, weight)


def test_strides() -> None:
    """Gaps between rows or columns, transposed. Elements in the gaps are unchanged."""
    case = merge_case(1, 30, 50, 9, BF16, F32, size=1.0, padding=3)
    apart = torch.full((30, 101), 7.0, dtype=BF16)
    for weight in (
        case.weight.t().contiguous().t(),
        apart[:, ::2][:, :50].copy_(case.weight),
        torch.full((30, 160), 7.0, dtype=BF16)[:, 3:53].copy_(case.weight),
    ):
        receipt = backend.merge_(weight, case.factors)
        expected = case.weight.clone()
        check_receipt(receipt, reference_backend.merge_(expected, case.factors))
        assert same_bits(weight, expected)
        backend.unmerge_(weight, receipt)
        assert torch.equal(bits(weight), bits(case.weight))
    assert bool((apart[:, 1::2] == 7).all())


def test_through_the_public_functions() -> None:
    """Lists of mixed dtypes; errors name the layer; autograd notices that a saved W has changed."""
    pairs = []
    for dtype, second in zip(DTYPES, (1, 2, 2), strict=True):  # one of several adapters
        pairs.append(
            [(w, f) for i, (w, f) in enumerate(zip(*layers(dtype, F32, seed=3), strict=True)) if i in (0, second)]
        )
    weights, factors = zip(*itertools.chain.from_iterable(pairs), strict=True)
    weights, merged = list(weights), copies(list(weights))
    A = [[f.lora_A[s:e] for s, e in zip((0, *f.ends), f.ends, strict=False)] for f in factors]
    B = [[f.lora_B[:, s:e] for s, e in zip((0, *f.ends), f.ends, strict=False)] for f in factors]
    s = [list(f.scaling) for f in factors]
    version = merged[0]._version
    receipts = functional.merge_layers_(merged, A, B, s, backend="triton")
    assert merged[0]._version > version
    alone = copies(weights)
    for weight, *arguments, receipt in zip(alone, A, B, s, receipts, strict=True):
        check_receipt(receipt, functional.merge_(weight, *arguments, backend="cpu"))
    changed = merged[2][0, 0].clone()
    merged[2][0, 0] = -changed
    with pytest.raises(ValueError, match="layer 2: weight: expected the bits that the merge left"):
        functional.unmerge_layers_(merged, receipts, backend="triton")
    merged[2][0, 0] = changed
    functional.unmerge_layers_(merged, receipts, backend="triton")
    for weight, new in zip(weights, merged, strict=True):
        assert torch.equal(bits(new), bits(weight))
    B[5][0] = B[5][0] * float("inf")
    with pytest.raises(ValueError, match="layer 5: weight: expected W"):
        functional.merge_layers_(merged, A, B, s, backend="triton")
    for weight, new in zip(weights, merged, strict=True):
        assert torch.equal(bits(new), bits(weight))


def test_explained() -> None:
    assert "merge_kernel" in peftk.explain("merge", dtype=BF16, adapter_dtype=F16, backend="triton").kernel
    assert "unmerge_kernel" in peftk.explain("unmerge", dtype=BF16, backend="triton").kernel
    assert "float64" in str(choice.cannot_run("triton", call("merge", dtype=torch.float64)))


def test_a_list_is_cut_where_its_codes_would_take_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, merge_layers_ = [], backend.merge_layers_
    monkeypatch.setattr(merge, "_MAX_WEIGHTS_PER_CALL", 150)
    monkeypatch.setattr(backend, "merge_layers_", lambda w, *rest: (lengths.append(len(w)), merge_layers_(w, *rest))[1])
    weights, factors = [torch.randn(6, 10) for _ in range(5)], [(torch.randn(2, 10), torch.randn(6, 2))] * 5
    before = [weight.clone() for weight in weights]
    receipts = functional.merge_layers_(weights, *map(list, zip(*factors, strict=True)), backend="triton")
    assert lengths == [2, 2]  # 60 weights each; the last of five is merged alone, not as a list
    functional.unmerge_layers_(weights, receipts, backend="triton")
    assert all(map(torch.equal, weights, before))
