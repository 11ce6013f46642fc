"""The segments kernels in the interpreter, against the specification: equal to the last integer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftk import reference
from peftk.triton_kernels import segments as kernels

I32, I64 = torch.int32, torch.int64
LEAST, MOST = torch.iinfo(I64).min, torch.iinfo(I64).max


def check(ids: Tensor, adapters: int) -> kernels.Segments:
    found = kernels.segments(ids, adapters)
    for name, tensor, expected in zip(found._fields, found, reference.segments(ids, adapters), strict=True):
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected), f"{name}: expected {expected}, got {tensor}"
    return found


def random_ids(M: int, adapters: int, seed: int = 0, dtype: torch.dtype = I32) -> Tensor:
    """Some of them outside, on both sides."""
    return torch.randint(-2, adapters + 2, (M,), generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of 64 rows: many of them in a moment. The kernels are the same."""
    monkeypatch.setattr(kernels, "TILE", 64)
    return 64


PATTERNS = {
    "base": lambda M, n: torch.full((M,), -1),
    "first": lambda M, n: torch.zeros(M, dtype=I64),
    "last": lambda M, n: torch.full((M,), n - 1),
    "a row each": lambda M, n: torch.arange(M).flip(0) % n,
    "sorted": lambda M, n: torch.arange(M) * (n + 1) // M - 1,
    "runs": lambda M, n: torch.arange(M) // 23 * 7 % n,
    "outside": lambda M, n: torch.tensor([n, -2, n + 1, 2**31 - 1, -(2**31)]).repeat(-(-M // 5))[:M],
    "random": lambda M, n: random_ids(M, n, 1, I64),
}


@pytest.mark.parametrize("M", [1, 40])
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_patterns_in_one_launch(pattern: str, M: int) -> None:
    check(PATTERNS[pattern](M, 41), 41)
    check(PATTERNS[pattern](M, 41).to(I32), 41)


@pytest.mark.parametrize("M", [65, 150])
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_patterns_in_three_launches(pattern: str, M: int, small_tiles: int) -> None:
    check(PATTERNS[pattern](M, 41), 41)
    check(PATTERNS[pattern](M, 200).to(I32), 200)


@pytest.mark.parametrize("adapters", [0, 1, 5])
@pytest.mark.parametrize("M", [0, 1, 2, 15, 16, 17, 63, 64])
def test_few_rows(M: int, adapters: int) -> None:
    check(random_ids(M, adapters), adapters)


@pytest.mark.parametrize("M", [255, 256, 257, 1023, 1024])
def test_heights_of_one_launch(M: int) -> None:
    check(random_ids(M, 20, dtype=I64), 20)


@pytest.mark.parametrize("M", [1025])
def test_three_launches_from_a_tile_on(M: int) -> None:
    check(random_ids(M, 100), 100)


@pytest.mark.parametrize("tiles", [2, 7])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_tiles_that_are_full_or_not(tiles: int, more: int, small_tiles: int) -> None:
    check(random_ids(64 * tiles + more, 3), 3)
    check(random_ids(64 * tiles + more, 0), 0)


def test_more_tiles_than_a_scan_takes_at_once(small_tiles: int) -> None:
    check(random_ids(64 * 33 + 5, 7), 7)


@pytest.mark.parametrize("adapters", [62, 63, 64, 128, 5000])
def test_chunks_of_adapters(adapters: int, small_tiles: int) -> None:
    """A tile goes through 64 groups at a time here; group 0 is the base layer's."""
    ids = random_ids(130, adapters, adapters)
    ids[:4] = torch.tensor([adapters - 1, 0, adapters - 2, adapters])
    check(ids, adapters)
    check(ids[:40], adapters)


def test_many_adapters_and_tiles() -> None:
    check(random_ids(1500, 2000, dtype=I64), 2000)


def test_as_many_adapters_as_a_key_holds() -> None:
    with pytest.raises(ValueError, match=r"adapters: expected at most 1048576, got 1048577"):
        kernels.segments(random_ids(3, 5), kernels.MOST_ADAPTERS + 1)
    assert (kernels.MOST_ADAPTERS + 1) * 1024 + 1023 < 2**31


@pytest.mark.parametrize("M", [12, 100])
def test_int64_ids_do_not_wrap(M: int, small_tiles: int) -> None:
    wild = torch.tensor([LEAST, MOST, 2**32, 2**32 + 1, -(2**32), 2**31, 2**63 - 2**32 + 1, 1, -1, 0])
    found = check(wild.repeat(10)[:M], 3)
    assert int(found.ends[0]) == int((found.ids == -1).sum())


@pytest.mark.parametrize("dtype", [I32, I64])
def test_strides(dtype: torch.dtype, small_tiles: int) -> None:
    ids = random_ids(300, 9, dtype=dtype).reshape(100, 3)
    for strided in (ids[:, 1], ids[::7, 2], ids[:1, :1].reshape(1).expand(90), ids.flatten()[1:]):
        check(strided, 9)


def test_same_bits_every_time_and_ids_unchanged(small_tiles: int) -> None:
    for M in (50, 200):
        ids = random_ids(M, 11)
        before = ids.clone()
        first, second = kernels.segments(ids, 11), kernels.segments(ids, 11)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(ids, before)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Every launch from here on: kernel and grid."""
    launches: list[tuple[str, tuple[int, ...]]] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append((self.name, grid))
            return self.kernel[grid]

    for name in ("segments_kernel", "sort_kernel", "scan_kernel", "scatter_kernel"):
        monkeypatch.setattr(kernels, name, Counted(name, getattr(kernels, name)))
    return launches


def test_launches_depend_on_the_numbers_of_rows_and_adapters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = counted(monkeypatch)
    monkeypatch.setattr(kernels, "TILE", 64)
    for M, adapters, expected in (
        (0, 4, [("segments_kernel", (1,))]),
        (64, 5000, [("segments_kernel", (1,))]),
        (65, 63, [("sort_kernel", (2,)), ("scan_kernel", (1,)), ("scatter_kernel", (2,))]),
        (300, 64, [("sort_kernel", (5,)), ("scan_kernel", (2,)), ("scatter_kernel", (5,))]),
    ):
        for pattern in ("base", "a row each", "random"):
            launches.clear()
            kernels.segments(PATTERNS[pattern](M, adapters) if M else torch.empty(0, dtype=I32), adapters)
            assert launches == expected


@pytest.mark.full
@pytest.mark.parametrize("adapters", [1, 64, 999, 1023, 1024, 5000])
@pytest.mark.parametrize("M", [1, 31, 33, 127, 129, 511, 513, 1024, 1025, 4095, 4096, 4097, 20000])
def test_at_length(M: int, adapters: int) -> None:
    check(random_ids(M, adapters, M, I64), adapters)
