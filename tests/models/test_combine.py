"""Tests that combined adapters equal those of HF PEFT's add_weighted_adapter, on the same adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftk
from peftk.checkpoints import peft as peft_checkpoint
from peftk.checkpoints.peft import LoadedAdapter
from peftk.models.combine import METHODS, combine

PRUNED = [method for method in METHODS if "svd" not in method and method not in ("linear", "cat")]
WIDTHS = {"first": (24, 40), "second": (40, 16)}  # module: K, N


def peft_model(ranks: tuple[int, ...], dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    """A chain of linears with adapters "0", "1", … of random factors, each with its own scaling."""
    torch.manual_seed(0)
    base = nn.Sequential()
    for name, (K, N) in WIDTHS.items():
        base.add_module(name, nn.Linear(K, N, dtype=dtype))
    configs = [
        peft.LoraConfig(r=r, lora_alpha=3 + 2 * i, target_modules=list(WIDTHS), init_lora_weights=False)
        for i, r in enumerate(ranks)
    ]
    model = peft.get_peft_model(base, configs[0], adapter_name="0", autocast_adapter_dtype=False)
    for i, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(i), config, autocast_adapter_dtype=False)
    return model


def loaded(model: peft.PeftModel, name: str) -> dict[str, LoadedAdapter]:
    layers = {n: getattr(model.base_model.model, n) for n in WIDTHS}
    return {
        n: LoadedAdapter(layer.lora_A[name].weight.data, layer.lora_B[name].weight.data, layer.lora_alpha[name], False)
        for n, layer in layers.items()
    }


def check(model: peft.PeftModel, count: int, weights: list[float], method: str, **options: Any) -> None:
    """Checks that factors equal PEFT's (for an SVD, with its arbitrary signs, their product). Repeats random draws."""
    ours = [loaded(model, str(i)) for i in range(count)]
    inject = model.base_model.inject_adapter

    def then_seed(*args: Any, **kwargs: Any) -> None:
        """PEFT also draws the new adapter's initial factors, which it then replaces."""
        inject(*args, **kwargs)
        torch.manual_seed(5)

    model.base_model.inject_adapter = then_seed
    model.add_weighted_adapter([str(i) for i in range(count)], weights, "theirs", combination_type=method, **options)
    theirs = loaded(model, "theirs")
    torch.manual_seed(5)
    combined = peftk.combine_checkpoints(ours, weights, method, **options)
    assert combined.keys() == theirs.keys()
    for name, adapter in combined.items():
        expected = theirs[name]
        assert adapter.scaling == expected.scaling == 1
        assert adapter.lora_A.dtype == expected.lora_A.dtype
        if method.endswith("svd"):
            torch.testing.assert_close(
                adapter.lora_B @ adapter.lora_A, expected.lora_B @ expected.lora_A, rtol=0, atol=2e-6
            )
        else:
            torch.testing.assert_close(adapter.lora_A, expected.lora_A, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(adapter.lora_B, expected.lora_B, rtol=1e-6, atol=1e-7)
        assert adapter.lora_A.shape == expected.lora_A.shape
        # not trivially: the adapter changes outputs
        assert float((adapter.lora_B @ adapter.lora_A).norm()) > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_pefts(method: str) -> None:
    pruned = method.removesuffix("_svd") in PRUNED
    for sign in ("total", "frequency") if "ties" in method else ("total",):
        options: dict[str, Any] = {"density": 0.4, "majority_sign_method": sign} if pruned else {}
        check(peft_model((4, 4, 4)), 3, [0.7, -0.4, 1.3], method, **options)


def test_other_arguments() -> None:
    check(peft_model((2, 5)), 2, [1.0, -2.0], "cat")
    check(peft_model((2, 5)), 2, [1.0, -2.0], "svd")
    check(peft_model((2, 5)), 2, [1.0, -2.0], "svd", svd_rank=3, svd_full_matrices=False)
    check(peft_model((2, 5)), 2, [1.0, -2.0], "ties_svd", density=0.5, svd_rank=7)
    check(peft_model((3,)), 1, [-0.5], "svd")
    check(peft_model((3, 3)), 2, [0.0, 0.5], "linear")
    check(peft_model((3, 3), torch.bfloat16), 2, [0.3, 0.5], "magnitude_prune", density=0.5)
    check(peft_model((3, 3), torch.float16), 2, [0.3, -0.5], "dare_ties", density=0.5)
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        check(peft_model((3, 3)), 2, [0.3, 0.5], "dare_linear", density=1.0)


def test_clamping() -> None:
    """An SVD's factors equal PEFT's up to signs; a clamp is symmetric, so magnitudes are compared."""
    model = peft_model((4, 4))
    adapters = [loaded(model, name) for name in "01"]
    model.add_weighted_adapter(["0", "1"], [1.0, 0.5], "theirs", combination_type="svd", svd_clamp=0.9)
    combined = peftk.combine_checkpoints(adapters, [1.0, 0.5], "svd", svd_clamp=0.9)
    for name, expected in loaded(model, "theirs").items():
        torch.testing.assert_close(combined[name].lora_A.abs(), expected.lora_A.abs(), rtol=0, atol=1e-5)
        torch.testing.assert_close(combined[name].lora_B.abs(), expected.lora_B.abs(), rtol=0, atol=1e-5)


def test_cat_is_the_weighted_sum() -> None:
    model = peft_model((2, 5, 1))
    adapters, weights = [loaded(model, name)["first"] for name in "012"], [0.5, -1.5, 2.0]
    combined = peftk.combine(adapters, weights, "cat")
    expected = sum(
        w * a.scaling * a.lora_B.double() @ a.lora_A.double() for w, a in zip(weights, adapters, strict=True)
    )
    torch.testing.assert_close(combined.lora_B.double() @ combined.lora_A.double(), expected, rtol=1e-5, atol=1e-6)
    # so is a merge with weights, which needs no new adapter
    W = torch.zeros(40, 24)
    scaling = [w * a.scaling for w, a in zip(weights, adapters, strict=True)]
    peftk.functional.merge_(W, [a.lora_A for a in adapters], [a.lora_B for a in adapters], scaling)
    torch.testing.assert_close(W.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_separate_generator() -> None:
    model = peft_model((3, 3))
    adapters = [loaded(model, name)["first"] for name in "01"]
    state = torch.get_rng_state()
    one, again, other = (
        peftk.combine(adapters, [1, 1], "dare_linear", density=0.5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one.lora_A, again.lora_A)
    assert not torch.equal(one.lora_A, other.lora_A)
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpoints_that_do_not_have_the_same_modules(tmp_path: Path) -> None:
    model = peft_model((3, 3))
    first, second = loaded(model, "0"), loaded(model, "1")
    config = {"r": 3, "lora_alpha": 5.0, "target_modules": ["first"]}
    peft_checkpoint.save(tmp_path, config, {"first": second["first"][:2]})
    combined = peftk.combine_checkpoints([first, tmp_path], [1.0, 2.0], "linear")
    assert list(combined) == ["first", "second"]
    both = peftk.combine([first["first"], second["first"]], [1.0, 2.0], "linear")
    assert torch.equal(combined["first"].lora_A, both.lora_A)
    assert torch.equal(combined["second"].lora_B, peftk.combine([first["second"]], [1.0], "linear").lora_B)


def test_bad_arguments() -> None:
    a = LoadedAdapter(torch.ones(2, 6), torch.ones(4, 2), 2.0, False)
    other = LoadedAdapter(torch.ones(3, 6), torch.ones(4, 3), 2.0, False)
    narrow = LoadedAdapter(torch.ones(2, 5), torch.ones(4, 2), 2.0, False)
    torn = LoadedAdapter(torch.ones(2, 6), torch.ones(4, 3), 2.0, False)
    huge = LoadedAdapter(torch.full((2, 6), 3e38), torch.ones(4, 2), 2.0, False)
    two: tuple[Any, Any] = ([a, a], [1.0, 1.0])
    cases: list[tuple[Any, Any, str, dict[str, Any], type[Exception], str]] = [
        (*two, "sum", {}, ValueError, "combination_type: expected one of svd, linear"),
        (*two, "ties", {}, ValueError, "density: expected 0 ≤ density ≤ 1 for ties, got None"),
        (*two, "dare_ties_svd", {"density": 0}, ValueError, "density: expected 0 < density"),
        (*two, "ties", {"density": 1.5}, ValueError, "density: expected"),
        (*two, "ties", {"density": 0.5, "majority_sign_method": "mean"}, ValueError, "majority_sign_method: expected"),
        (*two, "svd", {"svd_rank": 0}, ValueError, "svd_rank: expected an integer"),
        (*two, "svd", {"svd_rank": 5}, ValueError, "svd_rank: expected at most 4"),
        (*two, "svd", {"svd_clamp": 2.0}, ValueError, "svd_clamp: expected"),
        ([a, a], [1.0], "svd", {}, ValueError, "weights: expected one for each of 1 or more adapters, got 1 for 2"),
        ([], [], "svd", {}, ValueError, "weights: expected one for each of 1 or more"),
        ([a], [float("nan")], "svd", {}, ValueError, "weights: expected finite"),
        (a, [1.0], "svd", {}, ValueError, "weights: expected one"),
        ({"a": a}, [1.0], "svd", {}, TypeError, "adapters: expected a list"),
        ([a, "b"], [1, 1], "svd", {}, TypeError, "adapter 1: expected a LoadedAdapter, got str"),
        ([a, other], [1, 1], "linear", {}, ValueError, r"adapters: expected one rank for linear .* got \[2, 3\]"),
        ([a, narrow], [1, 1], "cat", {}, ValueError, "adapter 1: expected K = 6 and N = 4"),
        ([a._replace(lora_bias=torch.ones(4))], [1], "cat", {}, ValueError, "adapter 0: lora_bias: expected None"),
        ([torn], [1], "cat", {}, ValueError, r"adapter 0: expected lora_A \[R, K\]"),
        ([a, huge], [1, 2], "cat", {}, ValueError, "adapters: expected a combination that is finite in torch.float32"),
    ]
    for adapters, weights, method, options, error, message in cases:
        with pytest.raises(error, match=message):
            peftk.combine(adapters, weights, method, **options)
    with pytest.raises(ValueError, match=r"^layer: adapters: expected one rank"):
        peftk.combine_checkpoints([{"layer": a}, {"layer": other}], [1, 1], "linear")


@pytest.mark.parametrize("method", METHODS)
def test_factors_may_be_transposed_and_come_out_contiguous(method: str) -> None:
    """Files need contiguous factors."""
    torch.manual_seed(0)
    dense = [LoadedAdapter(torch.randn(4, 24), torch.randn(40, 4), 4.0, False) for _ in range(2)]
    turned = [a._replace(lora_A=a.lora_A.t().contiguous().t(), lora_B=a.lora_B.t().contiguous().t()) for a in dense]
    options = {"density": 0.5} if "ties" in method or "dare" in method or "prune" in method else {}
    both = [
        combine(adapters, [0.7, -0.4], method, generator=torch.Generator().manual_seed(3), **options)
        for adapters in (dense, turned)
    ]
    for factor in ("lora_A", "lora_B"):
        expected, got = (getattr(adapter, factor) for adapter in both)
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected)
