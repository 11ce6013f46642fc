"""What is measured when a class of shapes is first used, and what decides where nothing is."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import peftk
from peftk.backends import choice, first_use, made_on, measured, registry, shipped
from peftk.backends.call import Call
from peftk.system.timing import Times
from tests.support import calls

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine without AMX on which nothing was measured yet."""
    monkeypatch.setenv("PEFTK_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("PEFTK_FIRST_USE")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    choice.forget()
    yield tmp_path / "first_use.json"
    monkeypatch.undo()
    choice.forget()


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What the next measurements find, instead of measuring."""
    found: list[float | None] = []

    def gain(call: Call) -> float | None:
        return found.pop(0)

    monkeypatch.setattr(first_use, "_gain", gain)
    return found


def call(op: str = "lora_linear", *, M: int = 256, K: int = 1024, N: int = 1024, dtype: torch.dtype = F32) -> Call:
    return calls.call(op, M=M, K=K, N=N, rank=16, dtype=dtype)


def used(of: Call) -> str:
    backend = choice.backend_for(of)
    return next(name for name in ("cpu", "gemm") if registry.backend(name) is backend)


def test_the_first_call_measures_and_has_the_answer(cache: Path, gains: list[float | None]) -> None:
    gains += [1.3, 0.9]
    assert choice.choose(call()).reason.endswith("; the first call measures both")
    assert used(call()) == "gemm"
    assert used(call(M=100)) == used(call(M=5000)) == "gemm"  # the same class
    assert used(call(M=16)) == "cpu"
    assert not gains
    assert "measured at first use at M=128, N=1024, K=1024: torch's GEMM is 1.30" in choice.choose(call()).reason
    assert "0.90 times as fast, wanted 1.05 or more" in choice.choose(call(M=16)).reason
    entry = json.loads(cache.read_text())[made_on.machine("cpu")]
    assert entry["made_with"] == made_on.versions("cpu")
    assert set(entry["gain"].values()) == {1.3, 0.9}


def test_the_same_cache_gives_the_same_choice(cache: Path, gains: list[float | None]) -> None:
    gains += [1.3]
    assert used(call()) == "gemm"
    choice.forget()  # as a new process
    assert used(call()) == "gemm"


def test_a_layers_first_call_already_runs_as_measured(cache: Path, gains: list[float | None]) -> None:
    gains += [9.0]
    layer = peftk.LoRALinear.from_linear(torch.nn.Linear(512, 512), r=4)
    with torch.no_grad():
        layer.lora_B.normal_()
        x = torch.randn(64, 512)
        expected = peftk.functional.lora_linear(
            x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling, backend="gemm"
        )
        assert torch.equal(layer(x), expected)
    assert not gains


def test_without_gradients_calls_are_direct_once_it_is_decided(cache: Path, gains: list[float | None]) -> None:
    gains += [0.5]
    layer = peftk.LoRALinear.from_linear(torch.nn.Linear(512, 512), r=4)
    arguments = (layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
    x = torch.randn(64, 512)
    with torch.no_grad():
        assert peftk.ops.dispatch.direct_lora_linear(x, *arguments) is None
        layer(x)
        assert peftk.ops.dispatch.direct_lora_linear(x, *arguments) is not None


def test_where_it_is_too_slow_or_noisy_the_table_decides(cache: Path, gains: list[float | None]) -> None:
    gains += [None]
    assert used(call()) == "cpu"
    assert used(call()) == "cpu"  # and is not measured again
    assert choice.choose(call()).reason.endswith("too slow or too noisy to be measured at first use")


def test_measuring_ends_after_a_second(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((10.0, 10.6, 20.0, 20.6))
    monkeypatch.setattr(first_use.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(first_use, "_gain", lambda call: 2.0)
    assert [used(call(K=size)) for size in (512, 1024, 2048)] == ["gemm", "gemm", "cpu"]
    assert choice.choose(call(K=2048)).reason.endswith("1 s of measuring at first use are spent")


@pytest.mark.parametrize("way", ["off", "interpreted", "deterministic", "traced", "mode", "forced", "small"])
def test_where_nothing_is_measured(
    cache: Path, gains: list[float | None], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    where = call()
    if way == "off":
        monkeypatch.setenv("PEFTK_FIRST_USE", "0")
    elif way == "interpreted":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    elif way == "deterministic":
        torch.use_deterministic_algorithms(True)
    elif way == "traced":
        monkeypatch.setattr(torch._C, "_get_tracing_state", lambda: object())
    elif way == "small":
        where = call(M=1)
    try:
        if way == "mode":
            with FlopCounterMode(display=False):
                assert used(where) == "cpu"
        elif way == "forced":
            assert choice.backend_for(where, "gemm") is registry.backend("gemm")  # no gain is taken from the empty list
        else:
            assert used(where) == "cpu"
    finally:
        torch.use_deterministic_algorithms(False)
    assert not cache.exists()


def test_peftk_tune_goes_first(cache: Path, gains: list[float | None]) -> None:
    measured.save({"lora_linear float32": [measured.Point(256, 1024, 2.0)]}, "cpu")
    choice.forget()
    assert used(call()) == "gemm"
    assert not cache.exists()
    assert measured.delete()
    choice.forget()
    gains += [0.5]
    assert used(call()) == "cpu"
    assert measured.delete()
    assert first_use.delete() is False


def test_without_a_place_to_keep_it_nothing_is_measured(
    cache: Path, gains: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache.parent / "file").write_text("")
    monkeypatch.setenv("PEFTK_CACHE_DIR", str(cache.parent / "file" / "folder"))
    assert used(call()) == "cpu"
    assert "a measurement at first use could not be kept (" in choice.choose(call()).reason


def test_a_result_that_cannot_be_kept_does_not_count(
    cache: Path, gains: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    gains += [2.0]
    monkeypatch.setattr(first_use.cache, "save", full)
    assert used(call()) == "cpu"
    assert "no space left" in choice.choose(call()).reason


@pytest.mark.parametrize("content", ["{", '{"%s": {"made_with": %s, "seconds": -1, "gain": {}}}', "[1]"])
def test_a_broken_file_is_replaced(cache: Path, gains: list[float | None], content: str) -> None:
    if "%s" in content:
        content = content % (made_on.machine("cpu"), json.dumps(made_on.versions("cpu")))
    cache.write_text(content)
    gains += [1.3]
    with pytest.warns(UserWarning, match=r"first_use\.json: expected"):
        assert used(call()) == "gemm"
    choice.forget()
    assert used(call()) == "gemm"


def test_nobody_waits_for_another_threads_measurement(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def gain(call: Call) -> float:
        begun.set()
        assert go_on.wait(10)
        return 1.3

    monkeypatch.setattr(first_use, "_gain", gain)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(used(call())))
    thread.start()
    assert begun.wait(10)
    assert used(call()) == "cpu"  # as the table says
    go_on.set()
    thread.join()
    assert found == [used(call())] == ["gemm"]


def test_nobody_waits_for_another_processs_measurement(cache: Path, gains: list[float | None]) -> None:
    with cache.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert used(call()) == "cpu"
    gains += [1.3]
    assert used(call()) == "gemm"


def test_a_fork_during_a_measurement(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child waits for nobody, and while it lives the parent can measure again."""
    (said, say), (ended, end) = os.pipe(), os.pipe()
    children: list[int] = []
    other = call(M=16)

    def in_child() -> None:
        try:
            os.write(say, used(other).encode())
            os.read(ended, 1)
        finally:
            os._exit(0)

    def gain(measured: Call) -> float:
        if not children:
            children.append(os.fork())
            if children[0] == 0:
                in_child()
            assert os.read(said, 10) == b"cpu"  # as the table says
        return 1.3

    monkeypatch.setattr(first_use, "_gain", gain)
    try:
        assert used(call()) == "gemm"
        assert used(other) == "gemm"  # measured beside the child
    finally:
        os.write(end, b".")
        os.waitpid(children[0], 0)
        for descriptor in (said, say, ended, end):
            os.close(descriptor)


def test_a_call_within_a_measurement(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a handler of a signal."""
    within: list[str] = []

    def gain(measured: Call) -> float:
        within.append(used(measured))
        return 1.3

    monkeypatch.setattr(first_use, "_gain", gain)
    assert used(call()) == "gemm"
    assert within == ["cpu"]


def test_what_a_measurement_raises(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's timeout is not ours to catch. Without memory the table decides."""

    def fails_with(error: BaseException) -> None:
        def gain(call: Call) -> float:
            raise error

        monkeypatch.setattr(first_use, "_gain", gain)

    fails_with(TimeoutError("the user's"))
    with pytest.raises(TimeoutError, match="the user's"):
        used(call())
    fails_with(RuntimeError("no memory"))
    assert used(call()) == "cpu"
    assert "too slow or too noisy" in choice.choose(call()).reason


@pytest.mark.parametrize(("op", "K", "N"), [("lora_linear", 1 << 20, 100), ("lora_linear_backward", 4096, 128256)])
def test_what_is_too_large(cache: Path, gains: list[float | None], op: str, K: int, N: int) -> None:
    assert used(call(op, K=K, N=N)) == "cpu"
    assert "too large to be measured at first use" in choice.choose(call(op, K=K, N=N)).reason
    assert not cache.exists()


def test_a_single_sample_does_not_count(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "_seconds", lambda run: 0.015)
    assert first_use._gain(call(M=16)) is None


@pytest.mark.parametrize(
    ("ours", "library", "repeats", "gain"),
    [
        (Times(4.0, 2.0, 5.0, 4.0, 9), Times(2.0, 1.0, 5.0, 2.0, 9), 9, 2.0),
        (Times(4.0, 2.0, 5.0, 4.0, 9), Times(2.0, 1.0, 5.0, 2.0, 9), 1, None),  # too few
        (Times(4.0, 1.0, 5.0, 4.0, 9), Times(2.0, 1.0, 5.0, 2.0, 9), 9, None),  # median and fast end do not agree
    ],
)
def test_which_times_count(
    cache: Path, monkeypatch: pytest.MonkeyPatch, ours: Times, library: Times, repeats: int, gain: float | None
) -> None:
    times = {"ours": ours._replace(repeats=repeats), "library": library._replace(repeats=repeats)}
    monkeypatch.setattr(first_use, "_seconds", lambda run: 0.0)
    monkeypatch.setattr(first_use, "interleave", lambda sides, **_: times)
    assert first_use._gain(call(M=16)) == gain


def test_z_is_fp32_whatever_the_default(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr(
        registry.backend("cpu").backward, "lora_linear_backward", lambda dy, x, weight, adapter, z: seen.append(z.dtype)
    )
    torch.set_default_dtype(torch.float16)
    try:
        first_use._side("cpu", call("lora_linear_backward"))()
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == [torch.float32]


def test_a_child_of_a_fork_does_not_wait_for_the_parents_lock(cache: Path, gains: list[float | None]) -> None:
    gains += [1.3]
    with first_use._lock:
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if used(call()) == "gemm" else 1)
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_backward"])
def test_a_real_measurement(cache: Path, op: str) -> None:
    assert used(call(op, M=16)) in ("cpu", "gemm")
    entry = json.loads(cache.read_text())[made_on.machine("cpu")]
    assert list(entry["gain"]) == [f"{op} float32, M=16, N=1024, K=1024"]
    assert entry["seconds"] > 0


@pytest.mark.parametrize(
    ("op", "M", "K", "N", "shape"),
    [
        ("lora_linear", 1, 4096, 4096, (1, 1024, 4096)),
        ("lora_linear", 7, 1024, 3072, (4, 3072, 1024)),
        ("lora_linear", 63, 1024, 3072, (16, 3072, 1024)),
        ("multi_lora_linear", 64, 384, 384, (128, 384, 384)),
        ("lora_linear", 5000, 4096, 11008, (128, 512, 4096)),
        ("lora_linear_backward", 5000, 4096, 11008, (128, 11008, 128)),
        ("lora_linear", 5000, 1 << 20, 100, (128, 64, 1 << 20)),
    ],
)
def test_the_shape_that_stands_for_a_class(op: str, M: int, K: int, N: int, shape: tuple[int, int, int]) -> None:
    """At most 2²⁸ multiply-adds and 2²² weights, while 64 columns are not too much."""
    assert first_use._shape_of(call(op, M=M, K=K, N=N)) == shape


def test_the_shipped_table(cache: Path, gains: list[float | None], monkeypatch: pytest.MonkeyPatch) -> None:
    from peftk.backends import cpu

    monkeypatch.setattr(cpu, "simd_level", lambda: "avx2")
    assert used(call(dtype=BF16)) == "cpu"  # known: no gain is taken
    assert choice.choose(call(dtype=BF16)).reason.endswith("known without a measurement")
    monkeypatch.setattr(shipped, "cpu_vendor", lambda: "AuthenticAMD")
    assert shipped.row_for(F32).vendor == "AuthenticAMD"
    monkeypatch.setattr(shipped, "cpu_vendor", lambda: "Somebody")
    assert shipped.row_for(F32).vendor == ""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    choice.forget()
    assert choice.choose(call(dtype=BF16)).backend == "gemm"
    gains += [0.4]
    assert used(call(dtype=BF16)) == "cpu"  # measured there
