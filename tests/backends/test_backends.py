"""The choice of a backend: explained, forced by argument and environment, without falling back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import peftk
from peftk import functional
from peftk.backends import choice, reference
from peftk.backends.call import BackendError
from tests.support.calls import call


def test_explain_names_backend_reason_and_kernel() -> None:
    chosen = peftk.explain("lora_linear", M=4, K=4096, N=4096, dtype=torch.bfloat16)
    assert chosen.backend == "cpu"
    assert chosen.kernel
    assert str(chosen).startswith("cpu: ")


def test_explain_of_layers() -> None:
    linear = torch.nn.Linear(8, 8)
    lora = peftk.LoRALinear.from_linear(linear, r=2)
    assert peftk.explain(lora, torch.randn(3, 8)).backend == "cpu"
    assert peftk.explain(lora, M=3, backend="reference").backend == "reference"
    multi = peftk.MultiLoRALinear.from_linear(torch.nn.Linear(8, 8), max_adapters=2)
    assert peftk.explain(multi, M=5).backend == "cpu"
    with pytest.raises(TypeError, match="what: expected a LoRALinear"):
        peftk.explain(linear)
    with pytest.raises(ValueError, match="what: expected a layer or one of lora_linear"):
        peftk.explain("matmul")
    with pytest.raises(ValueError, match="M: expected 0 or more, got -1"):
        peftk.explain("lora_linear", M=-1)


def test_forcing_by_argument_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peftk.explain("lora_linear").backend == "cpu"
    monkeypatch.setenv("PEFTK_BACKEND", "reference")
    assert peftk.explain("lora_linear").backend == "reference"
    assert peftk.explain("lora_linear", backend="cpu").backend == "cpu"
    monkeypatch.setenv("PEFTK_BACKEND", "nonesuch")
    with pytest.raises(ValueError, match="backend: expected one of"):
        functional.lora_linear(torch.randn(2, 3), torch.randn(4, 3))


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_a_forced_backend_that_cannot_run_raises(backend: str) -> None:
    x, weight = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(peftk.BackendError, match=f"backend '{backend}' was forced and cannot run lora_linear"):
        functional.lora_linear(x, weight, backend=backend)


def test_what_a_forced_backend_chooses_in_turn_is_forced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sort = call("segments", dtype=torch.int32, adapter_dtype=None, adapters=2)
    with choice.forcing(None):
        assert choice.forced() is None
    with choice.forcing("cpu"), pytest.raises(peftk.BackendError, match="'cpu' was forced and cannot run segments"):
        choice.choose(sort)
    with choice.forcing("cpu"):
        assert choice.choose(sort, "reference").backend == "reference"
    seen, multi_lora_linear = [], reference.multi_lora_linear

    def spy(*args: object, **kwargs: object) -> object:
        seen.append(choice.forced())
        return multi_lora_linear(*args, **kwargs)

    monkeypatch.setattr(reference, "multi_lora_linear", spy)
    monkeypatch.setenv("PEFTK_BACKEND", "reference")
    layer = peftk.MultiLoRALinear.from_linear(torch.nn.Linear(8, 8), max_adapters=2)
    ids = torch.tensor([-1, -1])
    for backend in (None, "reference"):
        functional.multi_lora_linear(torch.randn(2, 8), layer.weight, None, layer.bank, ids, backend=backend)
    assert seen == [None, "reference"]
    assert choice.forced() is None


OLD_TRITON = """
import sys, types
triton = types.ModuleType("triton")
triton.__version__ = "3.5.1"
sys.modules["triton"] = triton
import peftk, torch
print(peftk.explain("lora_linear", device="cuda", dtype=torch.bfloat16, M=4, N=64, K=64, rank=4))
"""


def test_an_old_triton_is_refused_in_words() -> None:
    pytest.importorskip("triton")
    from peftk.backends import triton_version

    for version in ("3.6.0", "3.7.1", "3.9.0", "3.10.0+git1234", "4.0.0"):
        assert triton_version.problem(version) is None
    for version in ("2.3.1", "3.5.1", "unknown"):
        assert triton_version.problem(version) == f"needs Triton 3.6 or later, got {version}"
    for version, numpy, refused in (
        ("3.6.0", "2.4.6", True),
        ("3.6.1", "3.0", True),
        ("3.6.0", "2.3.5", False),
        ("3.6.0", None, False),
        ("3.7.1", "2.4.6", False),
    ):
        found = triton_version.problem(version, numpy)
        assert found == (
            f"the interpreter of Triton {version} needs NumPy before 2.4, got {numpy}" if refused else None
        )
    run = subprocess.run([sys.executable, "-c", OLD_TRITON], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "not triton: backend 'triton' cannot be imported: needs Triton 3.6 or later, got 3.5.1" in run.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets Triton")
def test_triton_on_amd_is_behind_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for op in ("lora_linear", "merge"):
        assert choice.cannot_run("triton", call(op, device="cuda")) == (
            "has not run on an AMD GPU yet; PEFTK_HIP=1 lets it try"
        )
    monkeypatch.setenv("PEFTK_HIP", "1")
    assert choice.cannot_run("triton", call(device="cuda")) is None


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets Triton")
def test_triton_refuses_cpu_tensors_without_the_interpreter() -> None:
    pytest.importorskip("triton")
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        choice.choose(call(), "triton")
    for dtype, refusal in ((torch.float16, None), (torch.float64, "float64")):
        why = choice.cannot_run("triton", call("merge", device="cuda", dtype=torch.bfloat16, adapter_dtype=dtype))
        assert why is None if refusal is None else refusal in str(why)
    assert choice.cannot_run("triton", call(device="cuda")) is None
    for x, weight, word in ((torch.float64, torch.float64, "float64"), (torch.float16, torch.bfloat16, "in one call")):
        mix = call(device="cuda", x_dtype=x, weight_dtype=weight)
        assert word in str(choice.cannot_run("triton", mix))
