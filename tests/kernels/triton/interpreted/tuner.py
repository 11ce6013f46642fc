"""Tuning in the interpreter: a fake clock, everything else as on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import peftk
from peftk.triton_kernels import config, lora_linear, tuned, tuner
from peftk.tuning import tune as tune_gpu

BF16 = torch.bfloat16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PEFTK_CACHE_DIR", str(tmp_path))
    tuned.forget_loaded()
    yield tmp_path / "gpu.json"
    tuned.forget_loaded()


def timer_favouring(name: str) -> tuner.Timer:
    """A timer for which the candidate of that name is the fastest."""

    def time(sides: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        return {side: 1.0 if side == name else 2.0 for side in sides}

    return time


def tune(name: str = "once=False", **options: Any) -> tuner.Tuned:
    layers = [config.Layer(32, 32, BF16, BF16, many) for many in (False, True)]
    return tuner.tune(CPU, timer=timer_favouring(name), **{"layers": layers, "tokens": (16,), **options})


def call(M: int = 16, N: int = 32, factors: torch.dtype = BF16) -> config.CallShape:
    return config.CallShape(M, N, 32, False, False, False, True, BF16, BF16, factors, False, 1)


def shape(M: int = 16) -> config.ShapeClass:
    return call(M).shape_class()


def save_tuned_plan() -> None:
    """Saves a plan, as tuning does: forward with one adapter in two launches."""
    tuned.save("interpreter", {shape().key(): config.candidates(shape(), "interpreter")[1]})


def launch_count() -> int:
    """The number of launches of a forward with one adapter."""
    x, weight, A, B = (torch.ones(*size, dtype=BF16) for size in ((16, 32), (32, 32), (16, 32), (32, 16)))
    one = lora_linear.AdapterArgs(A.data_ptr(), 32, B.data_ptr(), 16, 1, 0, 0, 16, 0, 1.0)
    kernel = mock.MagicMock()
    with mock.patch.object(lora_linear, "lora_linear_kernel", kernel):
        lora_linear.forward(x, weight, None, lora_linear.Adapters(one, BF16, 16, "k16", "r16"), None)
    return kernel.__getitem__.call_count


def test_the_fastest_is_kept_and_used(cache: Path) -> None:
    assert launch_count() == 1
    found, left = tune()
    assert not left
    assert set(found) == {
        *(f"{kind} {way}bfloat16 bfloat16 bfloat16 M=16" for kind in ("one", "many") for way in ("", "backward ")),
        "wgrad one bfloat16 ranks=16",
        "wgrad many bfloat16 ranks=16",
    }
    best = found["one bfloat16 bfloat16 bfloat16 M=16"]
    assert best.name == "once=False"
    assert (best.best_us, best.shipped_us) == (1.0, 2.0)
    assert found["wgrad one bfloat16 ranks=16"].name == "shipped"
    assert launch_count() == 2
    tuned.forget_loaded()  # as a later process would
    assert launch_count() == 2
    assert tuned.source(call(), CPU) == "tuned on this interpreter"
    assert "has not measured 'one bfloat16 bfloat16 bfloat16 M=64'" in tuned.source(call(64), CPU)
    assert tuned.delete("interpreter")
    assert not tuned.delete("interpreter")
    assert launch_count() == 1


def test_a_choice_does_not_change_behind_the_process(cache: Path) -> None:
    assert launch_count() == 1
    with mock.patch.object(tuned, "forget_loaded"):
        save_tuned_plan()
    assert launch_count() == 1


def test_other_versions_and_other_gpus_are_ignored(cache: Path) -> None:
    save_tuned_plan()
    kept = json.loads(cache.read_text())
    for changed, why in (
        ({"interpreter": {**kept["interpreter"], "made_with": {"triton": "1", "peftk": "1"}}}, "tune again"),
        ({"another": kept["interpreter"]}, "not tuned on this interpreter"),
    ):
        cache.write_text(json.dumps(changed))
        tuned.forget_loaded()
        assert launch_count() == 1
        assert why in tuned.source(call(), CPU)


@pytest.mark.parametrize("content", ["{", "[]", '{"interpreter": 1}', '{"interpreter": {"made_with": 3}}'])
def test_a_broken_file_is_ignored_with_a_warning_and_rewritten(cache: Path, content: str) -> None:
    cache.write_text(content)
    if "made_with" in content:
        assert launch_count() == 1
    else:
        with pytest.warns(UserWarning, match="expected what `peftk tune` writes"):
            assert launch_count() == 1
    save_tuned_plan()
    assert launch_count() == 2


@pytest.mark.parametrize("value", [3, {"BLOCK_M": 16}, None])
def test_a_plan_that_is_no_candidate_is_ignored_with_a_warning(cache: Path, value: object) -> None:
    save_tuned_plan()
    kept = json.loads(cache.read_text())
    kept["interpreter"]["plans"][shape().key()] = value
    cache.write_text(json.dumps(kept))
    tuned.forget_loaded()
    with pytest.warns(UserWarning, match="expected a candidate's plan"):
        assert launch_count() == 1


def test_a_candidate_with_another_result_is_an_error(cache: Path) -> None:
    right = lora_linear.forward

    def wrong(*args: Any, plan: config.Plan, **kwargs: Any) -> Any:
        y, z = right(*args, plan=plan, **kwargs)
        return (y if plan.once else y + 0.01), z

    with (
        mock.patch.object(lora_linear, "forward", wrong),
        pytest.raises(RuntimeError, match=r"one bfloat16 .* M=16: once=False: differs from"),
    ):
        tune()
    assert not cache.exists()


def test_explain_says_where_a_plan_comes_from(cache: Path) -> None:
    def said(**asked: Any) -> str:
        return peftk.explain("lora_linear", M=16, K=32, N=32, dtype=BF16, backend="triton", **asked).kernel

    assert "16 x 32 x 32 tiles" in said()
    assert "shipped table, interpreter; not tuned on this interpreter (peftk tune)" in said()
    save_tuned_plan()
    assert "2 launches" in said()
    assert "tuned on this interpreter" in said()


@pytest.mark.full
def test_the_default_layers_class_is_tuned(cache: Path) -> None:
    """fp32 factors beside 16-bit x and W, and what was tuned before stays."""
    save_tuned_plan()
    found, _ = tune(layers=tuner.layers_of([(32, 32)], [BF16]), tokens=(16, 17))
    assert [key for key in found if "float32" in key] == [
        f"one {way}bfloat16 bfloat16 float32 M={M}" for M in (16, 64) for way in ("", "backward ")
    ]
    assert any(key.startswith("many bfloat16 bfloat16 bfloat16") for key in found)
    for M in (16, 17):
        assert tuned.source(call(M, factors=torch.float32), CPU) == "tuned on this interpreter"
    assert launch_count() == 2
    assert {layer.factors for layer in tuner.LAYERS if not layer.many} == {torch.float32, BF16, torch.float16}
    assert {128, 256, 1024} <= set(tuner.TOKENS)


def test_a_layers_own_sizes_come_first(cache: Path) -> None:
    """The plan of a class is for any size, that of a size for it alone; the backward's N is the layer's K."""
    layers = [config.Layer(48, 32, BF16, BF16, many=False)]
    found, _ = tune(layers=layers, of_sizes=True)
    assert set(found) == {
        "one bfloat16 bfloat16 bfloat16 M=16 N=48 K=32",
        "one backward bfloat16 bfloat16 bfloat16 M=16 N=32 K=48",
        "wgrad one bfloat16 ranks=16",
    }
    assert tuned.source(call(N=48), CPU) == "tuned on this interpreter for this N and K"
    assert "shipped table" in tuned.source(call(), CPU)
    assert launch_count() == 1
    tune("shipped", layers=[config.Layer(32, 32, BF16, BF16, many=False)])
    assert tuned.source(call(), CPU) == "tuned on this interpreter"
    assert not tuned.lora_linear(call(N=48), CPU, "interpreter").once
    assert tuned.lora_linear(call(), CPU, "interpreter").once


def test_when_the_time_is_over_nothing_more_is_measured(cache: Path) -> None:
    found, left = tune(seconds=-1.0)
    assert not found
    assert left == 6
    assert launch_count() == 1
    clock = mock.Mock(monotonic=mock.Mock(side_effect=[0.0, 1.0, 1.0, *[3.0] * 100]))
    with mock.patch.object(tuner, "time", clock):
        found, left = tune(seconds=2.0)
    assert (len(found), left) == (2, 4)
    assert tuned.source(call(), CPU) == "tuned on this interpreter"


def test_splits_fill_the_processors_and_cost_little() -> None:
    """With few tokens: blocks for all processors, and fp32 parts below a sixteenth of W's bytes."""
    splits = []
    for M, N, K in [
        (1, 4096, 4096),
        (1, 128, 8192),
        (16, 4096, 4096),
        (16, 256, 8192),
        (64, 128, 8192),
        (4, 32000, 256),
    ]:
        plan = config.lora_linear(config.CallShape(M, N, K, False, False, False, True, BF16, BF16, BF16, False, 1), 90)
        tiles = -(-M // plan.BLOCK_M) * -(-N // plan.BLOCK_N)
        splits.append(plan.expand_splits)
        if plan.expand_splits > 1:
            assert tiles * plan.expand_splits <= plan.fill
            assert 4 * M * N * plan.expand_splits <= 2 * N * K / 16
    assert min(splits) == 1 < max(splits) <= 8


def test_our_kernels_against_torchs_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each point is time of ours / time of torch's product with our adapters, and both give the same."""
    seen: list[list[Any]] = []

    def timer(sides: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        results = [run() for run in sides.values()]
        seen.append(results)
        return {"triton": 3.0, "gemm": 2.0}

    said: list[str] = []
    monkeypatch.setattr(tune_gpu, "GPU_DIMS", (32,))
    monkeypatch.setattr(tune_gpu, "DTYPES", {"float32": torch.float32, "bfloat16": torch.bfloat16})
    grids = tune_gpu.gpu_gains(CPU, said.append, timer, tokens=(5,))
    assert set(grids) == {
        f"{op} {dtype}"
        for op in ("lora_linear", "multi_lora_linear", "lora_linear_backward", "multi_lora_linear_backward")
        for dtype in ("float32", "bfloat16")
    }
    assert all(points == [(5, 32, 1.5)] for points in grids.values())
    assert len(said) == len(seen) == 8
    layers = tuner.layers_of([(40, 32), (32, 40)], [BF16])
    grids = tune_gpu.gpu_gains(CPU, said.append, timer, tokens=(5,), layers=layers)
    ops = ("lora_linear", "multi_lora_linear", "lora_linear_backward", "multi_lora_linear_backward")
    assert set(grids) == {f"{op} bfloat16" for op in ops}
    assert all(points == [(5, 36, 1.5)] * 2 for points in grids.values())
    assert not tune_gpu.gpu_gains(CPU, said.append, timer, tokens=(5,), layers=layers, until=0.0)
    for (ours, _), (gemm, _) in seen:
        torch.testing.assert_close(ours, gemm, rtol=2e-2, atol=2e-2)
