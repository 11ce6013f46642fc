"""csrc/cuda/merge.cu on the host, through peftk.backends.cuda: W', receipts and W have the bits of the reference."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch
from torch import Tensor

import peftk
from peftk import _cuda, functional
from peftk.backends import cuda as backend
from peftk.backends import reference
from peftk.backends import reference as reference_backend
from peftk.launch import merge_layers
from peftk.ops import merge
from peftk.reference.merge import Factors
from peftk.reference.merge import factors as adapters
from peftk.reference.receipt import MergeReceipt
from tests.support.executor import Executor
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
from tests.support.paths import ROOT
from tests.support.tiers import spread

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPES = list(itertools.product(DTYPES, DTYPES))
# N, K and the ranks: single elements, whole and ragged tiles of both sizes, whole and partial chunks of 16 ranks
LAYERS = [
    ((1, 1), (1,)),
    ((65, 131), (17, 3)),
    ((3, 5), (2,)),
    ((40, 264), (1, 16, 33)),
    ((128, 64), (16,)),
    ((7, 8), (5,)),
]


def shifted_copy(tensor: Tensor, elements: int) -> Tensor:
    """A copy with the same strides in a heap block of exactly its size, which starts `elements` after a boundary."""
    (N, K), stride = tensor.shape, tensor.stride(0)
    block = torch.zeros(elements + (N - 1) * stride + K, dtype=tensor.dtype)
    return block[elements:].as_strided((N, K), (stride, 1)).copy_(tensor)


def layers(
    dtype: torch.dtype, adapter_dtype: torch.dtype, seed: int = 0, size: float = 0.5
) -> tuple[list[Tensor], list[Factors]]:
    """Layers of all kinds: rows with and without gaps, at multiples of 16 bytes and not."""
    weights, factors = [], []
    for i, (shape, ranks) in enumerate(LAYERS):
        case = merge_case(seed + i, *shape, 1, dtype, F32, size=1.0, padding=(0, 8, 3)[(seed + i) % 3])
        weights.append(shifted_copy(case.weight, (seed + i) // 3 % 2))
        factors.append(several(seed + i, weights[-1], ranks, size, adapter_dtype))
    return weights, factors


def unchanged(weights: list[Tensor], before: list[Tensor]) -> None:
    for weight, new in zip(weights, before, strict=True):
        assert torch.equal(bits(new), bits(weight))


def check(weights: list[Tensor], factors: list[Factors]) -> list[MergeReceipt]:
    """Merges in place: W', receipt and W are the reference's. Each side also unmerges what the other merged."""
    before = copies(weights)
    receipts = backend.merge_layers_(weights, factors)
    expected = copies(before)
    for i, (W, side) in enumerate(zip(expected, factors, strict=True)):
        theirs = reference_backend.merge_(W, side)
        assert same_bits(weights[i], W), f"layer {i}"
        check_receipt(receipts[i], theirs)
    assert backend.checksums(weights) == [receipt.checksum for receipt in receipts]
    for W, receipt in zip(expected, receipts, strict=True):
        reference_backend.unmerge_(W, receipt)
    unchanged(expected, before)
    backend.unmerge_layers_(weights, receipts)
    unchanged(weights, before)
    return receipts


FIRST = [types for types in TYPES if types[1] in (F32, types[0])]


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [pytest.param(*types, marks=() if types in FIRST else pytest.mark.full) for types in TYPES],
    ids=str,
)
def test_a_list_of_layers_in_one_launch(executor: Executor, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    seed = TYPES.index((dtype, adapter_dtype))
    executor.seed(seed)
    receipts = check(*layers(dtype, adapter_dtype, seed))
    assert sum(len(receipt.raw_values) for receipt in receipts) > 1500  # more than there was room for at first
    assert executor.statistics.launches == 5  # merge twice, sum_rows, unmerge, restore
    assert executor.statistics.resident > 1
    assert executor.statistics.threads[0] == 256


@pytest.mark.parametrize("part", spread(range(24), default=1, full=8))
def test_random_shapes(executor: Executor, part: int) -> None:
    """Shapes around the sizes of tiles, vectors and chunks, and any others; 30 layers per part."""
    rng = random.Random(part)
    edges = [1, 7, 8, 9, 63, 64, 65, 127, 128, 129]
    for case in range(10):
        executor.seed(1000 * part + case)
        dtype, adapter_dtype = TYPES[case % len(TYPES)]
        weights, factors = [], []
        for i in range(3):
            shape = rng.choice([*edges, rng.randint(1, 140)]), rng.choice([*edges, rng.randint(1, 140)])
            size = rng.choice([1e-6, 0.01, 1.0, 100.0])
            seed, padding = rng.randrange(10**6), rng.choice([0, 0, 1, 8])
            weight = merge_case(seed, *shape, 1, dtype, F32, size=1.0, padding=padding).weight
            weight.clamp_(-torch.finfo(dtype).max / 8, torch.finfo(dtype).max / 8)
            ranks = tuple(rng.choice([1, 2, 8, 16, 17, rng.randint(1, 40)]) for _ in range(rng.randint(1, 3)))
            factors.append(several(seed + i, weight, ranks, size, adapter_dtype))
            weights.append(shifted_copy(weight, rng.choice([0, 0, 1])))
        check(weights, factors)


@pytest.mark.parametrize(
    ("dtype", "bad"), [(F32, float("inf")), (BF16, float("nan")), (F16, 1e38), (F32, 3e38)], ids=str
)
def test_what_is_not_finite_is_refused_and_every_bit_stays(dtype: torch.dtype, bad: float) -> None:
    """At any place in the list: tiles and layers that were merged before it are restored."""
    for place, last in ((0, False), (3, True), (5, True)):
        check_refusal(backend, *layers(dtype, F32), bad, place, last=last)


def test_at_the_edge_of_what_is_finite() -> None:
    """The largest sum that rounds to a finite number is merged, the next one is not; an inf in W is not."""
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max
        ulp = largest - float(torch.tensor(largest, dtype=dtype).nextafter(torch.tensor(0.0, dtype=dtype)))
        weight = torch.full((5, 70), largest, dtype=dtype)
        A = torch.full((1, 70), 2.0**64)
        check([weight], [adapters([A], [torch.full((5, 1), ulp * 0.49 / 2.0**64)], [1.0])])
        for W, share in ((weight, 0.5), (torch.where(weight == largest, float("-inf"), weight), 0.0)):
            before = W.clone()
            with pytest.raises(ValueError, match="finite"):
                backend.merge_(W, adapters([A], [torch.full((5, 1), ulp * share / 2.0**64)], [1.0]))
            unchanged([W], [before])


def test_any_failure_leaves_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    check_failures_while_packing(backend, *layers(F32, F32, size=3.0), monkeypatch)


@pytest.mark.parametrize("ratio", FORMS)
def test_receipts_of_every_form_on_another_backend(ratio: float) -> None:
    check_forms_across_backends("cuda", ratio)


def test_more_raw_weights_than_there_is_room_for(executor: Executor) -> None:
    """Nearly every weight is raw: a second launch merges the tiles for which there was no room."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 200, generator=generator)
    A, B = torch.randn(4, 200, generator=generator), torch.randn(70, 4, generator=generator) * 1e4
    factors = [adapters([A], [B], [1.0]), adapters([A], [B[:3]], [1.0])]
    receipt, _ = check([weight.clone(), weight[:3].clone()], factors)
    assert len(receipt.raw_values) > 12_000
    assert executor.statistics.launches == 5
    executor.reset()
    check([weight.clone()], [adapters([A], [B * 1e-6], [1.0])])
    assert executor.statistics.launches == 3  # and nothing to restore
    bad = B.clone()
    bad[-1] = float("inf")
    merged = weight.clone()
    with pytest.raises(ValueError, match="finite"):
        backend.merge_(merged, adapters([A], [bad], [1.0]))
    unchanged([merged], [weight])


def test_room_to_the_last_raw_weight(executor: Executor) -> None:
    """A tile with as many raw weights as there is room for, and with one more."""
    for more in (0, 1):
        weight = torch.zeros(128 * 64)
        weight[: 128 * 64 // 256 + 1024 + more] = 1.3e-3
        executor.reset()
        (receipt,) = check([weight.view(128, 64)], [adapters([torch.ones(1, 64)], [torch.full((128, 1), 1e4)], [1.0])])
        assert len(receipt.raw_values) == 1056 + more
        assert executor.statistics.launches == 4 + more


@pytest.mark.parametrize("count", [25, pytest.param(100, marks=pytest.mark.full)])
def test_cycles(executor: Executor, count: int) -> None:
    """A different adapter and backend each time, in random schedules: W does not drift."""
    for dtype in DTYPES:
        case = merge_case(6, 20, 70, 16, dtype, F32, size=0.5, padding=0)
        weight = case.weight.clamp_(-1e4, 1e4)
        before = weight.clone()
        for cycle in range(count // len(DTYPES) + 1):
            executor.seed(cycle)
            names = random.Random(cycle).sample(("cuda", "cuda", "reference", "cpu"), 3)
            A, B = case.lora_A * (1 + cycle), case.lora_B / (2 + cycle)
            receipt = functional.merge_(weight, A, B, 1.5, backend=names[0])
            receipt = functional.remerge_(weight, receipt, [A, B.t() @ B @ A], [B, B], 0.1, backend=names[1])
            functional.unmerge_(weight, receipt, backend=names[2])
            unchanged([weight], [before])


def test_minus_zero_stays() -> None:
    """Chains that end in a product that rounds to -0, after sums of +0; W = -0 stays where d is -0."""
    for ranks in ((1, 1), (3, 2), (16,), (17, 5)):
        A, B = torch.full((sum(ranks), 40), 0.25), torch.zeros(7, sum(ranks))
        for end in itertools.accumulate(ranks):
            B[:, end - 1] = -(2.0**-149)
        factors = adapters(list(A.split(ranks)), list(B.split(ranks, dim=1)), [1.0] * len(ranks))
        check([torch.full((7, 40), -0.0)], [factors])
    A, B = torch.full((2, 40), 1.0), torch.full((7, 2), 2.0**-149)
    weight = torch.full((7, 40), -0.0)
    check([weight], [adapters([A[:1], A[1:]], [B[:, :1], B[:, 1:]], [-0.25, -0.25])])
    backend.merge_(weight, adapters([A[:1], A[1:]], [B[:, :1], B[:, 1:]], [-0.25, -0.25]))
    assert bool(weight.signbit().all())


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (F16, F16)], ids=str)
def test_denormals(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    case = merge_case(2, 40, 70, 16, dtype, F32, size=1.0, padding=0)
    tiny = torch.finfo(dtype).tiny
    weight = case.weight.clamp_(-1, 1) * (tiny / 2)
    factors = adapters([case.lora_A.to(adapter_dtype)], [case.lora_B.to(adapter_dtype)], [tiny / 2])
    merged, _ = reference.merge(weight, factors)
    assert int(((merged != 0) & (merged.abs() < tiny)).sum()) > 500
    check([weight], [factors])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_pattern_of_16_bits(dtype: torch.dtype) -> None:
    """All of them are widened, rounded at and next to ties, and encoded."""
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    B = weight.float().nan_to_num(0.0, 0.0, 0.0)[:, :1] * torch.tensor([[2.0**-9, 2.0**-12, 2.0**-24]])
    A = torch.tensor([[1.0], [-1.0], [0.5]]) * torch.randint(-3, 4, (3, 256), generator=torch.manual_seed(0))
    factors = adapters([A], [B], [1.0])
    check([torch.where(reference.merge(weight, factors)[0].isfinite(), weight, 1.0)], [factors])


def test_strides() -> None:
    """Transposed, with gaps between columns or rows, unaligned. Elements in the gaps are unchanged."""
    case = merge_case(1, 30, 50, 9, BF16, F32, size=1.0, padding=3)
    apart, rows = torch.full((30, 101), 7.0, dtype=BF16), torch.full((30, 160), 7.0, dtype=BF16)
    weights = [case.weight.t().contiguous().t(), apart[:, ::2][:, :50], rows[:, 3:53]]
    for weight in weights[1:]:
        weight.copy_(case.weight)
    check(weights, [case.factors] * 3)
    assert bool((apart[:, 1::2] == 7).all() and (rows[:, :3] == 7).all() and (rows[:, 53:] == 7).all())


def test_shared_memory(executor: Executor) -> None:
    """Two blocks need much less than the 100 KB or more that an SM has."""
    weight = torch.randn(8, 8)
    backend.checksum(weight)
    assert 0 < executor.statistics.shared_bytes <= 16_384


def test_the_table_is_what_the_kernels_read() -> None:
    """FIELDS in the order of `struct MergeLayer`."""
    source = (ROOT / "csrc/cuda/merge.h").read_text()
    body = re.sub(r"//.*", "", source.partition("struct MergeLayer {")[2].partition("};")[0])
    names = [name.strip(" *") for line in body.split(";") for name in line.split(",")]
    assert tuple(name.split()[-1].strip("*") for name in names if name.strip()) == merge_layers.FIELDS


def test_the_public_functions() -> None:
    """Lists of all dtypes; a refusal names the layer, and leaves the groups that were merged before it."""
    weights, factors = [], []
    for dtype in DTYPES:
        more = layers(dtype, F32, seed=3)
        weights, factors = weights + more[0], factors + more[1]
    before = copies(weights)
    A = [[f.lora_A[s:e] for s, e in zip((0, *f.ends), f.ends, strict=False)] for f in factors]
    B = [[f.lora_B[:, s:e] for s, e in zip((0, *f.ends), f.ends, strict=False)] for f in factors]
    s = [list(f.scaling) for f in factors]
    version = weights[0]._version
    receipts = functional.merge_layers_(weights, A, B, s, backend="cuda")
    assert weights[0]._version > version
    changed = weights[2][0, 0].clone()
    weights[2][0, 0] = -changed
    with pytest.raises(ValueError, match="layer 2: weight: expected the bits that the merge left"):
        functional.unmerge_layers_(weights, receipts, backend="cuda")
    weights[2][0, 0] = changed
    functional.unmerge_layers_(weights, receipts, backend="cuda")
    unchanged(weights, before)
    B[9][0] = B[9][0] * float("inf")
    with pytest.raises(ValueError, match="layer 9: weight: expected W"):
        functional.merge_layers_(weights, A, B, s, backend="cuda")
    unchanged(weights, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_checksum_is_the_references(dtype: torch.dtype) -> None:
    for N, K in ((1, 1), (3, 5), (33, 40), (67, 129), (130, 264), (2, 20_000)):  # the last: beyond 16 signed bits
        weight = shifted_copy(torch.randn(N, K + 8).to(dtype)[:, :K], 0)
        assert backend.checksum(weight) == reference.checksum(weight)
        weight[N // 2, K - 1] = float("nan")
        assert backend.checksum(weight) == reference.checksum(weight)


def test_what_is_refused() -> None:
    places = [0] * 6
    for dtype in (-1, 3):
        with pytest.raises(ValueError, match="dtype"):
            _cuda.unmerge(0, 0, 0, 1, 1, dtype, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="merge: size: expected a grid"):
        _cuda.merge(0, 0, 0, 1, 2**31, 0, 0, *places, 0, 0, 0)
    with pytest.raises(RuntimeError, match="unmerge: cudaErrorInvalidDevice"):
        _cuda.unmerge(0, 0, 0, 1, 1, 0, 0, 0, 2, 0)
    _cuda.merge(0, 0, 0, 0, 0, 0, 0, *places, 0, 0, 0)  # no tiles: no launch


def test_a_remerge_that_is_refused_leaves_what_was_merged() -> None:
    case = merge_case(6, 20, 70, 16, F32, F32, size=0.5, padding=0)
    receipt = backend.merge_(case.weight, case.factors)
    merged = case.weight.clone()
    bad = adapters([torch.ones(1, 70)], [torch.full((20, 1), float("inf"))], [1.0])
    with pytest.raises(ValueError, match="finite"):
        backend.remerge_(case.weight, receipt, bad)
    unchanged([case.weight], [merged])


def test_weights_beyond_32_bits_are_refused() -> None:
    for shape in ((2**31 - 2**16 + 1, 1), (1, 2**31)):
        weight = torch.zeros(1, 1).expand(shape)
        weight = weight if shape[1] == 1 else torch.empty(shape, dtype=torch.bfloat16, device="meta")
        with pytest.raises(ValueError, match=r"weight: expected at most 2147418112 rows and columns"):
            backend.checksum(weight)


def test_explained() -> None:
    assert "merge_kernel" in peftk.explain("merge", dtype=BF16, adapter_dtype=F16, backend="cuda").kernel
    assert "unmerge_kernel" in peftk.explain("unmerge", dtype=BF16, backend="cuda").kernel


@pytest.mark.parametrize("refused", [False, True])
def test_very_long_lists_take_several_launches(
    executor: Executor, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """Raw weights are counted in int32. All layers are merged, or none."""
    monkeypatch.setattr(merge, "_MAX_WEIGHTS_PER_CALL", 3000)
    cases = [merge_case(seed, 40, 50, 3, torch.float32, torch.float32, size=0.1, padding=0) for seed in range(4)]
    weights = [case.weight.clone() for case in cases]
    factors = [case.factors for case in cases]
    if refused:
        factors[3].lora_A.fill_(float("inf"))
        with pytest.raises(ValueError, match="layer 3"):
            merge.merge_layers_(weights, factors, backend="cuda")
    else:
        receipts = merge.merge_layers_(weights, factors, backend="cuda")
        assert executor.statistics.launches == 3
        for weight, case in zip(weights, cases, strict=True):
            assert same_bits(weight, reference.merge(case.weight, case.factors)[0])
        merge.unmerge_layers_(weights, receipts, backend="cuda")
    assert all(same_bits(weight, case.weight) for weight, case in zip(weights, cases, strict=True))
