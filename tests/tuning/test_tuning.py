"""`peftk tune`: measurements, the cache file, and the choice between our kernels and torch's matrix product."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import peftk
from peftk import cli
from peftk.backends import choice, made_on, measured, shipped
from peftk.backends.call import Call, Op
from peftk.tuning import blocking, model_shapes, tune
from tests.support import calls

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PEFTK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(blocking, "CHOICES", {})  # no search
    choice.forget()
    yield tmp_path / "cache" / "choice.json"
    monkeypatch.undo()
    choice.forget()


def call(op: str = "lora_linear", *, M: int = 256, dim: int = 4096, **rest: object) -> Call:
    return calls.call(op, M=M, K=dim, N=dim, rank=16, **rest)


def write(points: dict[str, list[tuple[int, int, float]]]) -> None:
    measured.save({key: [measured.Point(*point) for point in each] for key, each in points.items()}, "cpu")
    choice.forget()


def test_without_a_measurement_our_kernels_are_the_default(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(shipped, "cpu_vendor", lambda: "Somebody")
    chosen = choice.choose(call())
    assert chosen.backend == "cpu"
    assert chosen.reason == (
        "not measured on this machine (peftk tune); our kernels are the default; "
        "not measured at first use (PEFTK_FIRST_USE=0)"
    )
    assert not cache.exists()


def test_without_a_measurement_amx_tiles_are_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choice.choose(call(dtype=BF16)).backend == "gemm"
    assert "AMX" in choice.choose(call(dtype=BF16)).reason
    assert choice.choose(call(dtype=BF16, M=16)).backend == "cpu"
    assert choice.choose(call(dtype=F32)).backend == "cpu"


def test_the_nearest_shape_decides(cache: Path) -> None:
    write({"lora_linear float32": [(16, 1024, 2.0), (16, 4096, 0.5), (256, 1024, 0.5), (256, 4096, 2.0)]})
    assert choice.choose(call(M=300, dim=5000)).backend == "gemm"
    assert choice.choose(call(M=20, dim=5000)).backend == "cpu"
    assert choice.choose(call(M=300, dim=900)).backend == "cpu"
    assert choice.choose(call(M=20, dim=900)).backend == "gemm"
    chosen = peftk.explain("lora_linear", M=300, K=4096, N=8192)
    assert "measured at M=256, K=N=4096: torch's GEMM is 2.00 times as fast, wanted 1.05 or more" in chosen.reason
    assert "torch's GEMM for the base layer" in chosen.kernel
    assert choice.choose(call(op="multi_lora_linear")).backend == "gemm"
    # nothing was measured for these
    assert choice.choose(call(op="lora_linear_backward")).backend == "cpu"
    assert choice.choose(call(dtype=BF16)).backend == "cpu"


def test_a_second_rounding_must_be_worth_it(cache: Path) -> None:
    write({f"lora_linear {dtype}": [(256, 4096, 1.1)] for dtype in ("float32", "bfloat16")})
    assert choice.choose(call()).backend == "gemm"
    assert choice.choose(call(dtype=BF16)).backend == "cpu"


def test_calls_that_ignore_measurements(cache: Path) -> None:
    write({f"{op} {dtype}": [(256, 4096, 9.0)] for op in tune.OPS for dtype in tune.DTYPES})
    assert choice.choose(call()).backend == "gemm"
    assert choice.choose(call(M=1, dim=64)).backend == "cpu"
    assert choice.choose(call(weight_dtype=BF16)).backend == "cpu"
    assert choice.choose(call(), "cpu").backend == "cpu"
    assert choice.choose(call("merge")).backend == "cpu"
    torch.use_deterministic_algorithms(True)
    try:
        assert choice.choose(call()).backend == "cpu"
        assert "deterministic" in choice.choose(call()).reason
    finally:
        torch.use_deterministic_algorithms(False)


def test_layers_run_what_was_chosen(cache: Path) -> None:
    layer = peftk.LoRALinear.from_linear(torch.nn.Linear(256, 256), r=4).eval()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(128, 256)
    with torch.no_grad():
        before = layer(x)
        write({"lora_linear float32": [(128, 256, 3.0)], "lora_linear_backward float32": [(128, 256, 3.0)]})
        assert peftk.explain(layer, x).backend == "gemm"
        torch.testing.assert_close(layer(x), before)
    layer(x).sum().backward()
    assert layer.lora_A.grad is not None


def test_a_process_keeps_its_choice(cache: Path) -> None:
    assert choice.choose(call()).backend == "cpu"
    measured.save({"lora_linear float32": [measured.Point(256, 4096, 9.0)]}, "cpu")
    assert choice.choose(call()).backend == "cpu"
    assert choice.choose(call(M=257)).backend == "cpu"
    choice.forget()
    assert choice.choose(call()).backend == "gemm"


def test_other_versions_measure_again(cache: Path) -> None:
    write({"lora_linear float32": [(256, 4096, 9.0)]})
    entries = json.loads(cache.read_text())
    entries[made_on.machine("cpu")]["made_with"]["torch"] = "1.0"
    cache.write_text(json.dumps(entries))
    choice.forget()
    chosen = choice.choose(call())
    assert chosen.backend == "cpu"
    assert "peftk tune again" in chosen.reason


@pytest.mark.parametrize("text", ["{", "[]", '{"%s": 3}', '{"%s": {"made_with": {}, "gain": 1}}'])
def test_a_broken_cache_is_ignored_with_a_warning(cache: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(made_on, "versions", lambda device: {})
    cache.parent.mkdir()
    cache.write_text(text.replace("%s", made_on.machine("cpu")))
    with pytest.warns(UserWarning, match=r"choice.json: expected what `peftk tune` writes"):
        chosen = choice.choose(call())
    assert chosen.backend == "cpu"
    assert "cannot be read" in chosen.reason


def test_machines_share_a_file(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(json.dumps({"another machine": {"kept": True}}))
    write({"lora_linear float32": [(256, 4096, 9.0)]})
    assert set(json.loads(cache.read_text())) == {"another machine", made_on.machine("cpu")}
    assert tune.forget()
    assert not tune.forget()
    assert json.loads(cache.read_text()) == {"another machine": {"kept": True}}
    assert choice.choose(call()).backend == "cpu"


def test_tune_measures_writes_and_takes_effect(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TOKENS", (8, 32))
    monkeypatch.setattr(tune, "DIMS", (512, 1024))
    messages = []
    found = peftk.tune(messages.append, seconds=0.001)
    assert len(messages) == len(found) == 6
    for points in found.values():
        # the smallest shape always runs on our kernels
        assert [(p.M, p.dim) for p in points] == [(8, 1024), (32, 512), (32, 1024)]
        assert all(0 < p.gain < 1e4 for p in points)
    assert json.loads(cache.read_text())[made_on.machine("cpu")]["threads"] == torch.get_num_threads()
    assert "measured at M=32" in choice.choose(call()).reason


def test_a_slow_library_is_not_measured_in_larger_shapes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def gain(op: str, dtype: torch.dtype, M: int, dim: int, seconds: float) -> float:
        shapes.append((M, dim))
        return 0.2 if dim >= 1024 else 0.9

    monkeypatch.setattr(tune, "_gain", gain)
    points = list(tune._measure(Op("lora_linear"), F32, 0.001))
    assert (64, 512) in shapes
    assert (64, 1024) in shapes
    assert (64, 2048) not in shapes
    assert {p.dim for p in points} == set(tune.DIMS)


def test_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TOKENS", (16,))
    monkeypatch.setattr(tune, "DIMS", (1024,))
    monkeypatch.setattr(tune, "_gain", lambda op, dtype, *_: 2.0 if dtype == F32 else 0.5)
    done = CliRunner().invoke(cli.main, ["tune"])
    assert done.exit_code == 0, done.output
    assert "lora_linear float32" in done.output
    assert str(cache) in done.output.replace("\n", "")
    assert choice.choose(call()).backend == "gemm"
    assert "Forgotten" in CliRunner().invoke(cli.main, ["tune", "--forget"]).output
    assert "Nothing was measured" in CliRunner().invoke(cli.main, ["tune", "--forget"]).output
    assert choice.choose(call()).backend == "cpu"


def test_a_cache_that_cannot_be_written_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.write_text("a file where the folder should be")
    monkeypatch.setattr(tune, "_gain", lambda *_: 2.0)
    done = CliRunner().invoke(cli.main, ["tune"])
    assert done.exit_code == 1
    assert "cannot be written" in done.output
    assert choice.choose(call()).backend == "cpu"


@pytest.mark.parametrize("text", ["[]", "null", "{", "\xff"])
def test_a_broken_file_is_replaced_or_deleted(cache: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text, encoding="latin-1")
    monkeypatch.setattr(tune, "_gain", lambda *_: 2.0)
    assert CliRunner().invoke(cli.main, ["tune"]).exit_code == 0
    assert choice.choose(call()).backend == "gemm"
    cache.write_text(text, encoding="latin-1")
    assert "Forgotten" in CliRunner().invoke(cli.main, ["tune", "--forget"]).output
    assert not cache.exists()


@pytest.mark.parametrize("point", [("a", 512, 2.0), (0, 512, 2.0), (64, -512, 2.0), (64, 512, None), (64, 512)])
def test_impossible_points_are_ignored_with_a_warning(cache: Path, point: tuple[object, ...]) -> None:
    cache.parent.mkdir()
    entry = {"made_with": made_on.versions("cpu"), "gain": {"lora_linear float32": [point]}}
    cache.write_text(json.dumps({made_on.machine("cpu"): entry}))
    choice.forget()
    with pytest.warns(UserWarning, match="expected what `peftk tune` writes"):
        chosen = choice.choose(call())
    assert chosen.backend == "cpu"
    assert "cannot be read" in chosen.reason


def test_without_a_home_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PEFTK_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    choice.forget()
    try:
        assert "expected a home directory or PEFTK_CACHE_DIR" in choice.choose(call()).reason
        assert "cannot be written" in CliRunner().invoke(cli.main, ["tune", "--forget"]).output
    finally:
        monkeypatch.undo()
        choice.forget()


@pytest.fixture
def gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100, as far as a choice looks at it."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    choice.forget()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_gpu_a_model_decides_until_something_is_measured(gpu: None) -> None:
    form = {"M": 256, "dim": 1024, "dtype": F32, "device": "cuda"}
    assert choice.choose(call(**form)).backend == "gemm"
    assert "not measured on this GPU (peftk tune); modelled" in choice.choose(call(**form)).reason
    assert choice.choose(call(**{**form, "M": 4})).backend != "gemm"
    assert choice.choose(call(**{**form, "dtype": BF16})).backend != "gemm"
    measured.save({"lora_linear float32": [measured.Point(256, 1024, 0.5)]}, "cuda")
    measured.save({"lora_linear float32": [measured.Point(256, 1024, 9.0)]}, "cpu")
    choice.forget()
    assert choice.choose(call(**form)).backend != "gemm"
    assert "measured at M=256, K=N=1024: torch's GEMM is 0.50 times as fast" in choice.choose(call(**form)).reason
    assert choice.choose(call("multi_lora_linear", **form)).backend == "gemm"  # a grid of its own
    torch.use_deterministic_algorithms(True)
    try:
        assert choice.choose(call("multi_lora_linear", **form)).backend != "gemm"
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_a_gpu_nothing_is_asked_about_one() -> None:
    reason = measured.verdict(call(device="cuda"))
    assert reason == (False, "torch finds no GPU here; our kernels are the default", False) or torch.cuda.is_available()


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 50, "dtype": "float16",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": 50}


def test_the_sizes_of_a_models_linears(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    expected = ("LlamaModel", ((64, 96), (96, 64), (64, 64), (32, 64)), torch.float16)
    assert model_shapes.of_config(file) == model_shapes.of_config(tmp_path) == expected
    file.write_text(json.dumps(GPT2))  # its linears are Conv1D, stored [K, N]
    assert model_shapes.of_config(file) == ("GPT2Model", ((32, 128), (128, 32), (96, 32), (32, 32)), BF16)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "expected a config of a model"),
        ('{"model_type": "nothing"}', "expected a config of a model"),
        (json.dumps({**LLAMA, "num_hidden_layers": 0}), "expected a model with linear layers, got LlamaModel"),
        (None, "expected a config.json of transformers or a folder with one"),
    ],
)
def test_a_config_that_tells_no_sizes_is_an_error(tmp_path: Path, content: str | None, said: str) -> None:
    pytest.importorskip("transformers")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        model_shapes.of_config(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_for_a_model_needs_a_gpu(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.main, ["tune", "--model", str(tmp_path)])
    assert done.exit_code == 1
    assert "--model: expected a CUDA GPU" in done.output
    done = CliRunner().invoke(cli.main, ["tune", "--forget", "--model", str(tmp_path)])
    assert done.exit_code == 2
    assert "--model: not with --forget" in done.output


def test_tuning_for_a_model(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes a model's sizes, and what was measured of other shapes stays."""
    from peftk.triton_kernels import tuner

    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    asked: dict[str, object] = {}

    def tuned(device: object, progress: object, **options: object) -> tuner.Tuned:
        asked.update(options)
        return tuner.Tuned({}, 3)

    monkeypatch.setattr(tuner, "tune", tuned)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "_gpu_gain", lambda op, layer, M, *_: 9.0 if M == 64 else 0.5)
    measured.save({"lora_linear float16": [measured.Point(64, 2048, 0.5)]}, "cuda")
    done = CliRunner().invoke(cli.main, ["tune", "--model", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "LlamaModel in float16: 64 x 96, 96 x 64, 64 x 64, 32 x 64" in done.output
    assert "No time was left for 3 measurements" in done.output
    assert asked["of_sizes"] is True
    assert {(layer.N, layer.K) for layer in asked["layers"]} == {(64, 96), (96, 64), (64, 64), (32, 64)}
    assert {(layer.factors, layer.many) for layer in asked["layers"]} == {(F32, False), (torch.float16, True)}
    grid = measured._load_grids("cuda")[0]["lora_linear float16"]
    assert [point for point in grid if point.dim == 2048] == [(64, 2048, 0.5)]
    form = {"dtype": torch.float16, "device": "cuda", "M": 64}
    assert choice.choose(call(dim=64, **form)).backend == "gemm"
    assert choice.choose(call(dim=2048, **form)).backend != "gemm"
    monkeypatch.setattr(tune, "MODEL_SECONDS", -1.0)
    done = CliRunner().invoke(cli.main, ["tune", "--model", str(tmp_path)])
    assert "No time was left for 99 measurements" in done.output  # 8 layers, 6 numbers of rows, 2 ways; and 3
