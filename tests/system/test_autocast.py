"""The cast of a weight under torch.autocast: when it is made, shared and freed."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftk.system import autocast, streams

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def region(dtype: torch.dtype = BF16, *, cached: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, cache_enabled=cached)


def cast(weight: Tensor) -> Tensor:
    x, found = autocast.cast(torch.ones(1, weight.shape[1]), weight)
    assert found is not None
    assert x.dtype == found.dtype
    return found


def frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape), requires_grad=False)


def test_one_cast_until_the_outermost_region_ends() -> None:
    weight = frozen(5, 3)
    with region():
        first = cast(weight)
        assert torch.equal(first, weight.to(BF16))
        with region():
            assert cast(weight) is first
        with region(F16):
            assert torch.equal(cast(weight), weight.to(F16))
        with torch.autocast("cpu", enabled=False):
            assert autocast.cast(weight, weight) == (weight, weight)
        assert cast(weight) is first
        freed = weakref.ref(first)
        del first
        assert freed() is not None
    assert freed() is None
    assert autocast.cast(weight, weight) == (weight, weight)
    with region():
        assert torch.equal(cast(weight), weight.to(BF16))


def test_torch_can_empty_the_cache() -> None:
    weight = frozen(5, 3)
    with region():
        first = cast(weight)
        torch.clear_autocast_cache()
        assert cast(weight) is not first
        assert cast(weight) is cast(weight)


def test_without_a_cache() -> None:
    weight = frozen(5, 3)
    with region(cached=False):
        assert cast(weight) is not cast(weight)


def test_a_captured_graph_makes_its_own_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = frozen(5, 3)
    with region():
        before = cast(weight)
        monkeypatch.setattr(streams, "capturing", lambda device: True)
        assert cast(weight) is not before
        monkeypatch.undo()
        assert cast(weight) is before


def test_a_changed_weight_is_cast_again() -> None:
    weight = frozen(5, 3)
    with region():
        first = cast(weight)
        with torch.no_grad():
            weight.mul_(2.0)
        assert torch.equal(cast(weight), weight.to(BF16))
        for _ in range(4):  # memory that is free again may be given to the next tensor
            weight.data = torch.randn(5, 3)
            assert torch.equal(cast(weight), weight.to(BF16))
        assert not torch.equal(first, cast(weight))


def test_views_of_one_weight_share_a_cast() -> None:
    """A Conv1D stores Wᵀ, and its layer makes a new view for each call."""
    weight = frozen(3, 5)
    with region():
        assert cast(weight.t()) is cast(weight.t())
        assert torch.equal(cast(weight.t()), weight.t().to(BF16))
        assert torch.equal(cast(weight[1:]), weight[1:].to(BF16))


def test_a_cast_of_inference_mode_can_be_saved_for_a_backward() -> None:
    weight = frozen(5, 3)
    with region():
        with torch.inference_mode():
            first = cast(weight)
        assert not first.is_inference()
        assert cast(weight) is first
        assert not first.requires_grad


@pytest.mark.parametrize("kind", [{"dtype": F16}, {"requires_grad": True}], ids=str)
def test_what_torch_would_not_cache(kind: dict[str, Any]) -> None:
    weight = torch.randn(5, 3, **kind)
    with region():
        assert torch.equal(cast(weight), weight.to(BF16))
        assert cast(weight) is not cast(weight)
    with torch.inference_mode():
        made_here = torch.randn(5, 3)
    with region():
        assert cast(made_here) is not cast(made_here)


def test_fp64_and_low_precision_stay() -> None:
    wide, low = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=BF16)
    with region():
        assert autocast.cast(wide, wide) == (wide, wide)
        assert cast(low) is low


def test_freed_memory_is_not_read() -> None:
    """It is an error of the call, which names it."""
    weight = torch.randn(5, 3)
    weight.untyped_storage().resize_(0)
    with region():
        assert autocast.cast(torch.ones(1, 3), weight)[1] is weight


def test_a_checkpoint_saves_the_same_again() -> None:
    """It counts the tensors that are saved, and making the cache must not be one of them."""
    weight, x = frozen(3, 3), torch.randn(2, 3, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return (x * cast(weight).sum()).sin()

    with region():
        y = checkpoint(block, x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None


def test_off() -> None:
    x = torch.randn(2, 2)
    product = autocast.without(torch.mm)
    with region():
        assert torch.mm(x, x).dtype == BF16
        assert product(x, x).dtype == F32
        with autocast.off(x.device):
            assert torch.mm(x, x).dtype == F32
    with autocast.off(torch.device("meta")):
        pass
