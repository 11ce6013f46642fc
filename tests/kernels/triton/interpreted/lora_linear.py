"""The Triton forward in the interpreter, against the fp64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from peftk.adapters import table
from peftk.adapters.activations import CODES
from peftk.adapters.adapter import Adapter
from peftk.adapters.dropout import Dropout
from peftk.backends import reference
from peftk.backends import triton as backend
from peftk.launch import workspace
from peftk.reference import philox
from peftk.tools.selftest.plans import override_plan
from peftk.triton_kernels import config
from peftk.triton_kernels import lora_linear as kernels
from peftk.triton_kernels.arithmetic import INTERPRETED, round_to
from peftk.triton_kernels.philox import keep_mask
from tests.support import numerics
from tests.support.cases import Case, double, expected, normal, random_case
from tests.support.tiers import spread
from tests.support.triton_cases import BF16, F16, F32, MIXES, PATTERNS, adapter, make, with_far_rows

MORE_MIXES = [(F16, F16, F32), (F32, F32, BF16), (F32, BF16, F32), (BF16, F32, F32), (F16, F32, F16)]


def run(case: Case) -> Tensor:
    if case.ids is None:
        return backend.lora_linear(case.x, case.weight, case.bias, case.adapters[0])[0]
    return backend.multi_lora_linear(case.x, case.weight, case.bias, case.table(), case.ids)[0]


def check(case: Case) -> None:
    y = run(case)
    assert y.dtype == case.x.dtype
    try:
        numerics.check(y, *expected(case))
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error


def test_interpreted() -> None:
    assert INTERPRETED.value


@pytest.mark.parametrize("seed", spread(range(24), default=4))
def test_random(seed: int) -> None:
    check(random_case(seed, max_rows=40, max_width=80))


@pytest.mark.parametrize("factors", [BF16, F32])
def test_v_keeps_all_its_bits(factors: torch.dtype) -> None:
    """With fp32 outputs, nothing else in y and a v that does not cancel, a term of v that is left out would show."""
    A, B = normal(1, 70, dtype=factors, seed=3).abs(), normal(37, 1, dtype=factors, seed=4)
    x = normal(19, 70, dtype=F32, seed=1).abs()
    check(Case(x, torch.zeros(37, 70, dtype=BF16), None, (Adapter((A,), (B,), 1.0),), None))


@pytest.mark.parametrize("seed", spread(range(24, 48), default=2, full=6))
def test_random_in_two_launches(seed: int) -> None:
    with override_plan(once=False):
        check(random_case(seed, max_rows=40, max_width=80))


def test_two_launches_count_arrivals_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may run at the same time, so no counter may belong to both."""
    launches: list[set[int]] = []
    given: list[Tensor] = []
    run, add = kernels.Launch.run, InterpreterBuilder.create_atomic_rmw

    def counted(builder: InterpreterBuilder, op: object, pointers: TensorHandle, *rest: object) -> object:
        launches[-1].update(pointers.data.flatten().tolist())
        return add(builder, op, pointers, *rest)

    def exactly(device: torch.device, count: int) -> Tensor:
        given.append(torch.zeros(count, dtype=torch.int32))
        return given[-1]

    monkeypatch.setattr(workspace, "_counters", exactly)
    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", counted)
    monkeypatch.setattr(kernels.Launch, "run", lambda *arguments: (launches.append(set()), run(*arguments)))
    case = make(MIXES[0], (adapter(20, 300, 40, F32, "identity", 3),), None, 19, 300, 40)
    with override_plan(once=False, shrink_splits=3, expand_splits=2):
        check(case)
    shrink, expand = launches
    assert shrink
    assert expand
    assert not shrink & expand
    [counters] = given
    inside = range(counters.data_ptr(), counters.data_ptr() + counters.nbytes)
    assert all(pointer in inside for pointer in shrink | expand)
    assert not counters.any()


@pytest.mark.parametrize("seed", spread(range(1000, 1120), default=0, full=15))
def test_random_more(seed: int) -> None:
    check(random_case(seed))


RANKS = (1, 3, 16, 17, 64, 100)


@pytest.mark.parametrize(("rank", "mix"), spread(itertools.product(RANKS, MIXES[:3]), default=3))
def test_ranks_alone_and_together(rank: int, mix: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    ranks = (rank, 1, 0, 33)
    acts = list(CODES)
    adapters = tuple(adapter(r, 70, 37, mix[2], acts[(rank + i) % 5], 10 * i) for i, r in enumerate(ranks))
    check(make(mix, adapters[:1], None))
    check(make(mix, (*adapters, None), [i % 6 - 1 for i in range(19)]))


@pytest.mark.parametrize("mix", spread([(mix,) for mix in (*MIXES[3:], *MORE_MIXES)], default=2))
def test_mixed_dtypes(mix: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    adapters = (adapter(17, 70, 37, mix[2], "gelu", 0), adapter(5, 70, 37, mix[2], "identity", 9, biases=False))
    check(make(mix, adapters[:1], None))
    check(make(mix, adapters, sorted(i % 3 - 1 for i in range(19))))


@pytest.mark.parametrize(
    ("activation", "ids"), spread(itertools.product(CODES, (None, [0] * 19, list(range(19)))), default=3)
)
def test_activations(activation: str, ids: list[int] | None) -> None:
    adapters = tuple(adapter(5, 70, 37, F32, activation, 7 * i) for i in range(19 if ids and ids[1] else 1))
    check(make(MIXES[0], adapters, ids))


@pytest.mark.parametrize(("mix", "pattern"), spread(itertools.product(MIXES[:2], PATTERNS), default=3))
def test_id_patterns(pattern: str, mix: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    ranks = (4, 16, 0, 7, 20, 1, 33, 8)
    adapters = tuple(adapter(r, 70, 37, mix[2], "identity", 10 * i, biases=i % 2 == 0) for i, r in enumerate(ranks))
    check(make(mix, adapters, PATTERNS[pattern], M=40))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_outside_the_bank_are_the_base_layer(dtype: torch.dtype) -> None:
    adapters = (adapter(4, 70, 37, F32, "relu", 0), None, adapter(9, 70, 37, F32, "identity", 8))
    case = make(MIXES[0], adapters, [0, 2, -1, -1] * 4)
    wild = torch.tensor([0, 2, 3, -7] * 4, dtype=dtype)
    wild[2] = torch.iinfo(dtype).max
    case.x = case.x[:16]
    wilder, _ = backend.multi_lora_linear(case.x, case.weight, case.bias, case.table(), wild)
    assert torch.equal(run(case), wilder)


SHAPES = [(0, 37, 70), (1, 1, 1), (1, 37, 70), (16, 32, 32), (17, 33, 33), (5, 40, 300)]


@pytest.mark.parametrize(("shape", "mix"), spread(itertools.product(SHAPES, MIXES[:2]), default=5))
def test_shapes(shape: tuple[int, int, int], mix: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    M, N, K = shape
    adapters = (adapter(5, K, N, mix[2], "silu", 0), adapter(20, K, N, mix[2], "identity", 7))
    check(make(mix, adapters[:1], None, M, K, N))
    check(make(mix, adapters, [i % 3 - 1 for i in range(M)], M, K, N))
    check(make(mix, (None,), None, M, K, N))


def test_shrink_is_split_where_it_would_run_alone() -> None:
    form = config.CallShape(5, 40, 300, False, False, False, False, F32, F32, F32, False, 1)
    assert config.lora_linear(form, "interpreter").shrink_splits == 2  # test_shapes has this case


def test_strides_and_pages() -> None:
    """x and W in any layout, B transposed, an adapter in three separate pages."""
    A, B = normal(37, 64, dtype=BF16, seed=1, scale=0.1), normal(24, 37, dtype=BF16, seed=2)
    pool_A, pool_B = torch.zeros(9, 16, 64, dtype=BF16), torch.zeros(9, 16, 24, dtype=BF16)
    places = ((7, 0, 16), (2, 16, 32), (4, 32, 37))
    for place, start, stop in places:
        pool_A[place, : stop - start] = A[start:stop]
        pool_B[place, : stop - start] = B[:, start:stop].t()
    pages_A = tuple(pool_A[p, : stop - start] for p, start, stop in places)
    pages_B = tuple(pool_B[p, : stop - start].t() for p, start, stop in places)
    paged = Adapter(pages_A, pages_B, 0.5)
    x = normal(64, 38, dtype=BF16, seed=3).t()[::2]
    weight = normal(64, 48, dtype=BF16, seed=4, scale=0.1).t()[1::2]
    for ids in (None, torch.tensor([0, 1, -1] * 6 + [1], dtype=torch.int32)):
        check(Case(x, weight, None, (paged, Adapter((A,), (B,), 2.0)), ids))
    dense, _ = backend.lora_linear(x, weight, None, Adapter((A,), (B,), 0.5))
    assert torch.equal(dense, run(Case(x, weight, None, (paged,), None)))


@pytest.mark.parametrize(
    ("which", "many"), spread(itertools.product(("x", "weight", "A", "B"), (False, True)), default=3)
)
def test_rows_beyond_32_bits(which: str, many: bool) -> None:
    check(with_far_rows(which, many))


@pytest.mark.parametrize("ranks", [(2, 5) * 4, (20, 2, 17, 5)], ids=["row by row", "segment by segment"])
def test_scratch_memory_counts_only_where_it_was_written(ranks: tuple[int, ...]) -> None:
    """z, filled with NaN here, has room for the largest adapter's ranks; rows of a smaller one do not write all."""
    adapters = tuple(adapter(rank, 30, 20, BF16, "identity", 9 * i) for i, rank in enumerate(ranks))
    check(make(MIXES[1], adapters, [i % len(ranks) for i in range(19)], K=30, N=20))


IDS = [None, [0] * 17 + [1] * 3, [i % 8 - 1 for i in range(20)]]


@pytest.mark.parametrize(("mix", "ids", "K"), spread(itertools.product(MIXES[:2], IDS, (64, 37)), default=2))
def test_dropout_and_z(K: int, ids: list[int] | None, mix: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    """Exactly the reference's mask, and the z that the backward needs, within the fp32 bound."""
    p, seed = 0.3, torch.tensor([0x123456789ABCDEF])
    adapters = tuple(adapter(5 + 4 * i, K, 24, mix[2], "gelu", 9 * i) for i in range(7))
    case = make(mix, adapters, ids, M=20, K=K, N=24)
    kwargs = {"dropout": Dropout(p, seed), "save_z": True}
    wide = tuple(double(a) for a in adapters)
    if ids is None:
        y, z = backend.lora_linear(case.x, case.weight, case.bias, adapters[0], **kwargs)
        y_star, z_star = reference.lora_linear(
            case.x.double(), case.weight.double(), case.bias.double(), wide[0], **kwargs
        )
    else:
        y, z = backend.multi_lora_linear(case.x, case.weight, case.bias, case.table(), case.ids, **kwargs)
        full = table.build(wide, dtype=torch.float64, device=torch.device("cpu"))
        y_star, z_star = reference.multi_lora_linear(
            case.x.double(), case.weight.double(), case.bias.double(), full, case.ids, **kwargs
        )
    assert z.dtype == F32
    scale = case.x.double().abs().sum(1, keepdim=True) * 4  # over all terms: |A| < 4/√K, p = 0.3
    numerics.check(z, z_star, (scale + 4).expand_as(z_star), K)
    numerics.check(y, y_star, (scale + 4).expand_as(y_star), K)


def test_a_row_never_meets_another_adapter() -> None:
    """inf and NaN in one adapter's tensors or in one row of x stay with the rows that use them."""
    for ids in ([0] * 9 + [1] * 9 + [-1], [i % 9 for i in range(19)]):
        adapters = tuple(adapter(5, 70, 37, F32, "identity", 7 * i) for i in range(9))
        good = run(make(MIXES[0], adapters, ids))
        for number, value in enumerate((float("inf"), float("nan"))):
            poisoned = tuple(adapter(5, 70, 37, F32, "identity", 7 * i) for i in range(9))
            poisoned[0].pages_A[0][number, 3] = value
            poisoned[0].pages_B[0][2, number] = value
            case = make(MIXES[0], poisoned, ids)
            case.x[18] = value
            y = run(case)
            clean = torch.tensor([i != 0 and m != 18 for m, i in enumerate(ids)])
            assert torch.equal(y[clean], good[clean])
            assert not y[:9][~clean[:9]][:, 2].isfinite().any()


@triton.jit
def _round_kernel(x, y, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)
    tl.store(y + offset, round_to(tl.load(x + offset), y.dtype.element_ty))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_outputs_round_to_nearest_even(dtype: torch.dtype) -> None:
    x = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32).view(F32)
    half = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00000001], dtype=torch.int32).view(F32)
    x[:5] = half
    y = torch.empty(4096, dtype=dtype)
    _round_kernel[(1,)](x, y, SIZE=4096)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _keep_kernel(seed, out, first_row, K, threshold, QUADS: tl.constexpr, WIDTH: tl.constexpr):
    row = first_row + tl.arange(0, 4).to(tl.int64)
    kept = keep_mask(seed, row, 8, K, threshold, QUADS, WIDTH)
    tl.store(out + tl.arange(0, 4)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], kept.to(tl.int8))


@pytest.mark.parametrize(("K", "quads"), [(4096, True), (4096, False), (4097, False)])
def test_masks_of_rows_beyond_32_bits(K: int, quads: bool) -> None:
    seed, first_row, width = torch.tensor([-5]), 2**33 + 3, 32
    threshold = philox.threshold(0.6)
    out = torch.empty(4, width, dtype=torch.int8)
    _keep_kernel[(1,)](seed, out, first_row, K, threshold - 2**32, QUADS=quads, WIDTH=width)
    element = (first_row + torch.arange(4))[:, None] * K + 8 + torch.arange(width)
    words = torch.stack(philox._philox(element // 4, seed.reshape(())), dim=-1)
    word = words.gather(-1, (element % 4)[..., None])[..., 0]
    assert torch.equal(out.bool(), word >= threshold)
