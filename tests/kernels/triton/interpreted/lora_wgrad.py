"""All gradients in one Triton launch, in the interpreter, against the fp64 reference."""

from __future__ import annotations

import dataclasses
import inspect
import itertools

import pytest
import torch

from peftk.adapters import activations
from peftk.adapters.adapter import AdapterGrads, Wanted
from peftk.adapters.dropout import flat_dropout
from peftk.backends import triton as backend
from peftk.launch import workspace
from peftk.triton_kernels import config
from peftk.triton_kernels import lora_wgrad as kernels
from peftk.triton_kernels.segments import segments
from tests.support import numerics
from tests.support.cases import Case, expected_grads, normal, random_case
from tests.support.tiers import spread
from tests.support.triton_cases import BF16, F32, MIXES, PATTERNS, adapter, make
from tests.support.wgrad_cases import Inputs, all_wanted, inputs

GRADS = AdapterGrads._fields


def run(given: Inputs, wanted: list[Wanted] | None = None) -> list[AdapterGrads | None]:
    case = given.case
    if case.ids is None:
        adapters, _ = backend._one_adapter(case.adapters[0])
        order = None
    else:
        adapters, order = backend._build_table_adapters(case.table()), segments(case.ids, len(case.adapters))
    ranks = [None if a is None else a.rank for a in case.adapters]
    wanted = wanted or [all_wanted(a) for a in case.adapters]
    plan = kernels.plan(
        ranks, wanted, (0, case.weight.shape[0]), case.x.dtype, case.x.device, many=case.ids is not None
    )
    p, seed = flat_dropout(given.dropout)
    grads = kernels.wgrad(
        given.dy, case.x, given.z, given.u, adapters, order, plan, dropout_p=p, seed=seed
    )  # fmt: skip
    assert not any(counters.any() for counters in workspace._of_stream.values()), "a counter was left"
    return grads


def check(case: Case, *, dropout_p: float = 0.0) -> list[AdapterGrads | None]:
    given = inputs(case, dropout_p=dropout_p)
    grads = run(given)
    _, expected, _, magnitudes, terms = expected_grads(case, given.dy, dropout=given.dropout)
    assert len(grads) == len(case.adapters)
    for index, a in enumerate(case.adapters):
        if a is None:
            assert grads[index] is None
            continue
        for name, wants in zip(GRADS, all_wanted(a), strict=True):
            actual = getattr(grads[index], name)
            assert (actual is not None) == wants, f"{case}: {name} of adapter {index}"
            if not wants:
                continue
            assert actual.dtype == case.adapter_dtype()
            assert actual.is_contiguous()
            try:
                numerics.check(actual, getattr(expected[index], name), getattr(magnitudes[index], name), terms)
            except AssertionError as error:
                raise AssertionError(f"{case}: {name} of adapter {index}: {error}") from error
    return grads


@pytest.fixture(params=[False, True], ids=["whole", "ranges"])
def ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test with whole segments, and with ranges of 16 rows."""
    if request.param:
        monkeypatch.setattr(config, "wgrad_range", lambda *_: 16)


# Ranges always, whole segments in the full tier: for tests that say the same of both.
OF_RANGES = pytest.mark.parametrize("ranges", spread([True, False], default=1), indirect=True)


@pytest.mark.parametrize("seed", spread(range(8), default=2))
def test_random(seed: int, ranges: None) -> None:
    check(random_case(20_000 + seed, max_rows=40, max_width=80), dropout_p=0.25 if seed % 4 == 0 else 0.0)


@pytest.mark.parametrize("seed", spread(range(80), default=0, full=10))
def test_random_more(seed: int, ranges: None) -> None:
    check(random_case(30_000 + seed), dropout_p=0.25 if seed % 4 == 0 else 0.0)


@pytest.mark.parametrize(("rank", "mix"), spread(itertools.product((1, 16, 17, 64, 100, 512), MIXES[:3]), default=2))
def test_ranks_alone_and_together(rank: int, mix: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    K, N = (40, 24) if rank < 512 else (24, 16)
    acts = list(activations.CODES)
    adapters = tuple(adapter(r, K, N, mix[2], acts[(rank + i) % 5], 10 * i) for i, r in enumerate((rank, 1, 0, 33)))
    check(make(mix, adapters[:1], None, 37, K, N))
    check(make(mix, (*adapters, None), [i % 6 - 1 for i in range(37)], 37, K, N))


@pytest.mark.parametrize("mix", spread([(mix,) for mix in MIXES[3:]], default=2))
def test_mixed_dtypes(mix: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    adapters = (adapter(17, 70, 37, mix[2], "gelu", 0), adapter(5, 70, 37, mix[2], "identity", 9, biases=False))
    check(make(mix, adapters[:1], None))
    check(make(mix, adapters, sorted(i % 3 - 1 for i in range(19))))


@pytest.mark.parametrize("activation", list(activations.CODES))
def test_activations(activation: str) -> None:
    """act(0) = 0 for all activations, but ranks and rows that a tile does not have must not rely on it."""
    adapters = (adapter(5, 70, 37, F32, activation, 0), adapter(3, 70, 37, F32, activation, 7))
    check(make(MIXES[0], adapters, [i % 2 for i in range(19)]))


@OF_RANGES
@pytest.mark.parametrize(("mix", "pattern"), spread(itertools.product(MIXES[:2], PATTERNS), default=3))
def test_id_patterns(pattern: str, mix: tuple[torch.dtype, torch.dtype, torch.dtype], ranges: None) -> None:
    adapters = tuple(
        adapter(r, 40, 37, mix[2], "identity", 10 * i, biases=i % 2 == 0)
        for i, r in enumerate((4, 16, 0, 7, 20, 1, 33, 8))
    )
    grads = check(make(mix, adapters, PATTERNS[pattern], 40, 40, 37))
    for index, of_adapter in enumerate(grads):
        if index not in PATTERNS[pattern]:
            assert not any(grad.any() for grad in of_adapter if grad is not None), "zeros for one who isn't there"


SHAPES = [(0, 37, 70), (1, 1, 1), (1, 37, 70), (16, 32, 32), (65, 33, 97)]


@pytest.mark.parametrize(("shape", "mix"), spread(itertools.product(SHAPES, MIXES[:2]), default=4))
def test_shapes(shape: tuple[int, int, int], mix: tuple[torch.dtype, torch.dtype, torch.dtype], ranges: None) -> None:
    M, N, K = shape
    adapters = (adapter(5, K, N, mix[2], "silu", 0), adapter(20, K, N, mix[2], "identity", 7))
    check(make(mix, adapters[:1], None, M, K, N))
    check(make(mix, adapters, [i % 3 - 1 for i in range(M)], M, K, N))
    check(make(mix, (None,), None, M, K, N))


@pytest.mark.parametrize(
    ("before", "length"), spread(itertools.product((0, 1, 15, 16), (1, 16, 17, 18, 33)), default=5)
)
def test_a_segment_ends_and_begins_at_any_place(before: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 1 to 33 rows after 0 to 16 other rows, in ranges of 16: every position relative to the boundaries."""
    adapters = tuple(adapter(2, 8, 8, F32, "identity", 9 * i) for i in range(3))
    monkeypatch.setattr(config, "wgrad_range", lambda *_: 16)
    check(make(MIXES[0], adapters, [0] * before + [1] * length + [2] * 5, before + length + 5, 8, 8))


@OF_RANGES
def test_strides(ranges: None) -> None:
    x, dy = normal(64, 38, dtype=BF16, seed=3).t()[::2], normal(19, 70, dtype=BF16, seed=4)[:, 1:49:2]
    weight = normal(24, 64, dtype=BF16, seed=5, scale=0.1)
    adapters = (adapter(17, 64, 24, BF16, "relu", 0), adapter(3, 64, 24, BF16, "identity", 7))
    for ids in (None, [0, 1, -1] * 6 + [1]):
        case = Case(x, weight, None, adapters[:1], None)
        if ids:
            case = Case(x, weight, None, adapters, torch.tensor(ids, dtype=torch.int32))
        given = dataclasses.replace(inputs(case), dy=dy)
        expected = run(dataclasses.replace(given, dy=dy.contiguous(), case=dataclasses.replace(case, x=x.contiguous())))
        same_bits(run(given), expected)


def same_bits(grads: list[AdapterGrads | None], expected: list[AdapterGrads | None]) -> None:
    for a, b in zip(grads, expected, strict=True):
        for grad, other in zip(a or (), b or (), strict=True):
            assert (grad is None) == (other is None)
            assert grad is None or torch.equal(grad, other)


IDS = [None, [0] * 17 + [1] * 3, [i % 8 - 1 for i in range(20)]]


@pytest.mark.parametrize(("mix", "ids", "K"), spread(itertools.product(MIXES[:2], IDS, (64, 37)), default=2))
def test_dropout(K: int, ids: list[int] | None, mix: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    """Exactly the reference's mask: one element more or less would be far outside the bound."""
    adapters = tuple(adapter(5 + 4 * i, K, 24, mix[2], "gelu", 9 * i) for i in range(7))
    check(make(mix, adapters if ids else adapters[:1], ids, 20, K, 24), dropout_p=0.3)


@OF_RANGES
@pytest.mark.parametrize("value", spread([float("nan"), float("inf")], default=1))
def test_a_row_never_meets_another_adapter(value: float, ranges: None) -> None:
    """inf and NaN in the rows of one adapter, or of the base layer, do not reach other adapters' gradients."""
    ids = [0] * 20 + [1, 2, -1] * 5 + [2] * 17
    adapters = tuple(adapter(5, 40, 37, F32, "identity", 7 * i) for i in range(3))
    given = inputs(make(MIXES[0], adapters, ids, len(ids), 40, 37))
    good = run(given)
    for name in ("x", "dy", "z", "u"):
        poisoned = dataclasses.replace(given, case=dataclasses.replace(given.case, x=given.case.x.clone()))
        for field in ("dy", "z", "u"):
            setattr(poisoned, field, getattr(given, field).clone())
        tensor = poisoned.case.x if name == "x" else getattr(poisoned, name)
        tensor[3, 2] = tensor[22, 1] = value  # a row of adapter 0 and one of the base layer
        grads = run(poisoned)
        same_bits(grads[1:], good[1:])
        reached = {"x": "lora_A", "dy": "lora_B", "z": "lora_B", "u": "lora_A"}[name]
        assert not getattr(grads[0], reached).isfinite().all()
        assert getattr(grads[0], "lora_B" if reached == "lora_A" else "lora_A").isfinite().all()


SUBSETS = [Wanted(*(bool(bits >> kind & 1) for kind in range(4))) for bits in range(16)]


@pytest.mark.parametrize("many", spread([False, True], default=1))
def test_only_what_is_wanted(many: bool) -> None:
    """Every subset of one adapter's gradients, with all of another's: the same bits as when all are computed."""
    adapters = (adapter(20, 40, 37, F32, "silu", 0), adapter(3, 40, 37, F32, "identity", 7))
    case = make(MIXES[0], adapters if many else adapters[:1], [0, 1, 0, -1] * 9 + [0] if many else None, 37, 40, 37)
    given = inputs(case)
    everyone = run(given)
    for wants in SUBSETS:
        grads = run(given, [wants, Wanted()][: len(case.adapters)])
        kept = AdapterGrads(*(grad if want else None for grad, want in zip(everyone[0], wants, strict=True)))
        same_bits(grads, [kept, *everyone[1:]])


def test_frozen_adapters_take_no_room() -> None:
    adapters = tuple(adapter(r, 40, 37, F32, "identity", 7 * r) for r in (20, 3, 17))
    nothing = Wanted(False, False, False, False)
    plan = kernels.plan([20, 3, 17], [nothing, Wanted(), Wanted(lora_A=False)], (0, 37), F32, torch.device("cpu"))
    assert plan.sizes == (1, (1 + 2) * 37, 1 + 2, 2 * 37)
    assert plan.heads == 2
    assert plan.firsts.tolist() == [[0, 0], [0, 1], [1, 1]]
    given = inputs(make(MIXES[0], adapters, [0, 1, 2, 0] * 5, 20, 40, 37))
    grads = run(given, [nothing, Wanted(), Wanted()])
    same_bits(grads, [AdapterGrads(None, None, None, None), *run(given)[1:]])


@OF_RANGES
def test_an_adapters_gradient_does_not_depend_on_its_neighbours(ranges: None) -> None:
    """Ranges are counted from the segment's first row, and rows keep their order: the same bits in any batch."""
    adapters = tuple(adapter(r, 40, 37, F32, "gelu", 7 * r) for r in (20, 3))
    given = inputs(make(MIXES[0], adapters, [0, 1, 1] * 13, 39, 40, 37))
    other = dataclasses.replace(given, case=dataclasses.replace(given.case, ids=given.case.ids.clone()))
    other.case.ids[other.case.ids == 0] = -1
    same_bits(run(given)[1:], run(other)[1:])


@OF_RANGES
def test_the_same_bits_twice(ranges: None) -> None:
    given = inputs(random_case(20_001, many=True), dropout_p=0.25)
    same_bits(run(given), run(given))


def test_ranges_fill_the_processors_within_their_memory() -> None:
    """The cost and gain of splits in the shipped configuration."""
    bf16 = config.wgrad(1, False, True, BF16, 90)
    assert config.wgrad_range(4096, 1, 1, 64, bf16) == 512  # 8 ranges · 64 tiles
    assert config.wgrad_range(100, 1, 1, 64, bf16) >= 100
    for M in (0, 1, 4096, 10**6):
        for groups in (1, 8):
            for blocks in (1, 64, 500):
                rows = config.wgrad_range(M, 300, groups, blocks, bf16)
                ranges = -(-M // rows)
                assert rows % bf16.BLOCK_R == 0
                assert ranges <= 16
                assert ranges <= 1 or 2 * ranges * groups * blocks * 17 * bf16.BLOCK_C * 4 <= 65 << 20


def test_scalars_have_the_width_that_they_need() -> None:
    """A kernel's annotations determine the width of its scalars: s and 1/(1 - p) are fp32."""
    parameters = inspect.signature(kernels.wgrad_kernel.fn).parameters.values()
    none = (inspect.Parameter.empty, "tl.constexpr")
    scalars = {p.name: p.annotation for p in parameters if p.annotation not in none}
    assert {scalars.pop(name) for name in ("scaling", "keep_scale")} == {"tl.float32"}
    assert set(scalars.values()) == {"tl.int32"}
