"""The model of waves, recomputed by hand for ten shapes, and what follows from it. All times are modelled."""

from __future__ import annotations

import pytest
import torch

from peftk.triton_kernels import config, modelled, waves

H100 = waves.machine(90)  # 132 processors, 7.496e6 flops a µs each, 3.35e6 bytes a µs
BF16 = torch.bfloat16

# M, N, K, tile and splits → µs. waves · 2 · rows · columns · K / splits / (7.496e6 · efficiency), or bytes / 3.35e6.
BY_HAND = [
    ((128, 4096, 4096), (128, 256, 1), 44.8),  # 16 tiles, 1 wave: 268.4e6 / 5.997e6
    ((512, 4096, 4096), (128, 256, 1), 44.8),  # 64 tiles, 1 wave
    ((512, 4096, 4096), (128, 128, 1), 25.6),  # 128 tiles, 1 wave: 134.2e6 / 5.247e6
    ((1024, 4096, 4096), (128, 128, 1), 51.2),  # 256 tiles, 2 waves
    ((1024, 14336, 4096), (128, 256, 1), 179.0),  # 448 tiles, 4 waves of 3.4
    ((128, 4096, 4096), (64, 128, 1), 16.3),  # 64 tiles, 1 wave: 67.1e6 / 4.123e6
    ((128, 4096, 4096), (64, 128, 2), 13.1),  # 128 tiles, 8.1 of products; 35.7e6 + 8.4e6 bytes take longer
    ((256, 4096, 4096), (64, 128, 1), 16.3),  # 128 tiles, 1 wave
    ((4096, 4096, 4096), (128, 256, 1), 179.0),  # 512 tiles, 4 waves
    ((1, 4096, 4096), (16, 64, 1), 11.2),  # 64 tiles: 8.39e6 / 0.7496e6; W's bytes alone take 10.0
]


@pytest.mark.parametrize(("product", "tiles", "us"), BY_HAND)
def test_by_hand(product: tuple[int, int, int], tiles: tuple[int, int, int], us: float) -> None:
    assert waves.product_us(waves.Product(*product), waves.Tiles(*tiles), H100) == pytest.approx(us, rel=0.01)


def call(
    M: int,
    N: int,
    *,
    many: bool = False,
    backward: bool = False,
    dtype: torch.dtype = BF16,
    factors: torch.dtype | None = None,
) -> config.CallShape:
    return config.CallShape(M, N, 4096, many, False, backward, True, dtype, dtype, factors or dtype, False, 1)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("many", "factors"), [(False, BF16), (True, BF16), (False, torch.float32)])
def test_no_cliff_between_65_and_1024_rows(many: bool, factors: torch.dtype, backward: bool) -> None:
    """At most 1.5 times as long as the library's best tiles and splits; without other tiles it was 4 times."""
    for M in (65, 100, 128, 200, 256, 384, 512, 768, 1024):
        for N in (4096, 8192, 14336):
            shape = call(M, N, many=many, backward=backward, factors=factors)
            plan = config.lora_linear(shape, 90)
            tiles = waves.Tiles(plan.BLOCK_M, plan.BLOCK_N, plan.expand_splits)
            product = waves.Product(M, N, 4096)
            assert waves.product_us(product, tiles, H100) <= 1.5 * waves.library_us(product, H100), (M, N, tiles)


@pytest.mark.parametrize("target", [80, 86, 89, 90, 100, 103, 120, "hip", "interpreter"])
def test_every_plan_is_a_candidate_of_its_class(target: int | str) -> None:
    """So that whatever is launched has been compiled by the tests, and can be tuned."""
    for M in (1, 16, 64, 65, 128, 256, 512, 1024, 4096):
        for many in (False, True):
            for backward in (False, True):
                shape = call(M, 4096, many=many, backward=backward)
                plan = config.lora_linear(shape, target)
                listed = config.candidates(shape.shape_class(), target)
                assert config.with_splits(plan, shape, target) == plan
                assert plan._replace(shrink_splits=1, expand_splits=1) in listed
                assert set(config.candidates(shape.shape_class(), target, few=True)) <= set(listed)


def test_triton_beside_a_library() -> None:
    """Slower in the same tiles, where more than reading W takes the time; and adapters on top are a launch more."""
    for M, factor in ((64, 1.0), (65, waves.TRITON)):
        product, tiles = waves.Product(M, 4096, 4096), waves.Tiles(64, 128)
        assert waves.triton_us(product, tiles, H100) == factor * waves.product_us(product, tiles, H100)
    shape = call(256, 4096)
    alone, with_adapter = (modelled.library_us(shape._replace(z_pages=pages), 90) for pages in (0, 1))
    on_top = waves.expand_in_place_us(waves.Product(256, 4096, 4096), 16, H100)
    assert with_adapter > alone + waves.GAP_US + on_top


def test_a_launch_looks_its_plan_up() -> None:
    """The model takes a hundred microseconds, and every launch asks."""
    assert config.lora_linear(call(256, 4096), 90) is config.lora_linear(call(256, 4096), 90)


def test_a_series_adapter_is_never_split() -> None:
    for M in (1, 64, 128, 512):
        assert config.lora_linear(call(M, 4096)._replace(identity=True), 90).expand_splits == 1


def test_the_library_is_preferred_where_the_model_says_so() -> None:
    few, some = call(16, 4096), call(256, 1024)
    assert modelled.prefer_library(few, 90, 1.15)[0] is False
    assert modelled.prefer_library(some, 90, 1.15)[0] is True
    assert modelled.prefer_library(some, 90, 1e9)[0] is False
    assert modelled.prefer_library(call(256, 4096, dtype=torch.float32), 90, 1.05)[0] is True
    assert modelled.prefer_library(call(16, 4096, dtype=torch.float32), 90, 1.05)[0] is False
    assert "modelled" in modelled.prefer_library(some, 90, 1.15)[1]
