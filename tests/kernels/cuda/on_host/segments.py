"""csrc/cuda/segments.cu on the host: exactly equal to the specification, in every schedule."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import peftk
from peftk.backends import choice
from peftk.backends import cuda as backend
from peftk.backends import segments as sorting
from peftk.launch.segments import MOST_ADAPTERS, Segments
from tests.support import stubs
from tests.support.executor import Executor
from tests.support.segment_cases import I32, I64, PATTERNS, WILD, check_segments, random_ids
from tests.support.tiers import spread


def check(ids: Tensor, adapters: int) -> Segments:
    return check_segments(sorting.of(ids, adapters), ids, adapters)


def test_the_choice_is_the_module_under_test() -> None:
    chosen = peftk.explain("segments", M=3)
    assert (chosen.backend, chosen.kernel) == ("cuda", "1 launch: segments_kernel")
    assert "3 launches" in peftk.explain("segments", M=1025).kernel


@pytest.mark.parametrize("M", range(71))
def test_few_rows(M: int) -> None:
    """From no row to as many as one warp sorts, with and without adapters."""
    for adapters in (0, 1, 5):
        check(random_ids(M, adapters, M, I64 if M % 2 else I32), adapters)


@pytest.mark.parametrize("M", [255, 256, 257, 1023, 1024, 1025, 2100])
def test_borders(M: int) -> None:
    for adapters, dtype in ((3, I32), (40, I64)):
        check(random_ids(M, adapters, M, dtype), adapters)


@pytest.mark.parametrize("M", [40, 300, 1100])
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_patterns(pattern: str, M: int) -> None:
    ids = PATTERNS[pattern](M, 41)
    check(ids, 41)
    check(ids.flip(0).to(I32), 41)


@pytest.mark.parametrize("adapters", [127, 128, 255, 256, 257, 1023, 1024, 5000])
def test_many_adapters(adapters: int) -> None:
    """From 256 adapters on, several blocks share the ends; from 1,024 on, segments are numbered in chunks."""
    for M in (20, 1030):
        ids = random_ids(M, adapters, adapters)
        ids[:4] = torch.tensor([adapters - 1, 0, adapters - 2, adapters])
        check(ids, adapters)


def test_as_many_adapters_as_a_key_holds() -> None:
    most = MOST_ADAPTERS
    check(torch.tensor([most - 1, most, -1, 5, most - 1]), most)
    with pytest.raises(ValueError, match=r"adapters: expected at most 1048576, got 1048577"):
        sorting.of(random_ids(3, 5), most + 1)


def test_the_launcher_refuses_what_it_has_no_kernel_for() -> None:
    ids = random_ids(3, 5)
    for M, adapters, message in (
        (3, 2**20 + 1, "adapters: expected at most"),
        (2**31 - 1024, 5, "ids: expected fewer"),
    ):
        with pytest.raises(ValueError, match=f"segments: {message}"):
            backend._cuda.segments(ids.data_ptr(), 1, False, M, adapters, *[0] * 7, 0, 0)


@pytest.mark.parametrize("M", [12, 70, 1100])
def test_int64_ids_do_not_wrap(M: int) -> None:
    found = check(WILD.repeat(-(-M // 10))[:M], 3)
    assert int(found.ends[0]) == int((found.ids == -1).sum())


@pytest.mark.parametrize("dtype", [I32, I64])
def test_strides(dtype: torch.dtype) -> None:
    """ids in heap blocks of exactly their size: nothing outside a row may be read."""
    for M, stride in itertools.product((1, 50, 300, 1030), (0, 1, 3)):
        block = random_ids((M - 1) * stride + 1, 9, M, dtype)
        check(block.as_strided((M,), (stride,)), 9)


@pytest.mark.parametrize("M", [50, 200, 1000, 2100])
def test_same_bits_in_every_schedule(M: int, executor: Executor) -> None:
    ids = random_ids(M, 300, M)
    before, expected = ids.clone(), sorting.of(ids, 300)
    for seed in range(4):
        executor.seed(seed)
        executor.limit_resident(seed)
        assert all(map(torch.equal, sorting.of(ids, 300), expected))
    assert torch.equal(ids, before)


def test_launches_depend_on_the_numbers_of_rows_and_adapters_alone(executor: Executor) -> None:
    for M, adapters, launches, last_grid in (
        (0, 4, 1, (1, 1, 1)),
        (64, 255, 1, (1, 1, 1)),
        (1024, 256, 1, (1, 2, 1)),
        (1025, 64, 3, (2, 1, 1)),
        (2100, 3000, 3, (3, 1, 1)),
    ):
        for pattern in ("base", "a row each", "random") if M else ():
            executor.reset()
            sorting.of(PATTERNS[pattern](M, adapters), adapters)
            assert executor.statistics.launches == launches
            assert tuple(executor.statistics.grid) == last_grid


def test_one_sort_serves_every_layer_of_a_route(executor: Executor) -> None:
    routed = peftk.adapters.route.Route(torch.tensor([2, -1, 0])).forward()
    ids = peftk.adapters.route.flat(routed.rows(torch.randn(3, 8)))
    assert ids is not None
    first = sorting.of(ids, 4)
    executor.reset()
    assert sorting.of(ids, 4) is first
    assert executor.statistics.launches == 0
    with choice.forcing("reference"):  # a forced backend does not use another backend's sort
        forced = sorting.of(ids, 4)
    assert executor.statistics.launches == 0
    assert forced is not first
    assert all(map(torch.equal, forced, first))


@pytest.mark.parametrize(
    ("M", "adapters"),
    spread(itertools.product([33, 129, 513, 1024, 1025, 4097, 17 * 1024 + 5], [1, 64, 1023, 5000]), default=0, full=9),
)
def test_at_length(M: int, adapters: int) -> None:
    """The largest M gives a strip of the scan more than one tile."""
    check(random_ids(M, adapters, M, I64), adapters)


@pytest.mark.full
@pytest.mark.parametrize("M", [64, 256, 1024, 1025, 3000])
def test_same_bits_in_many_schedules(M: int, executor: Executor) -> None:
    ids = random_ids(M, 40, M)
    for seed in range(1, 21):
        executor.seed(seed)
        executor.limit_resident(seed % 5)
        check(ids, 40)


def test_the_stub_says_what_the_module_has() -> None:
    assert stubs.differences(backend._cuda) == []
