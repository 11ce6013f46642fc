"""Runs `tests/interpreted/` in a process where TRITON_INTERPRET=1 was set before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftk import backends

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


def interpret(marker: str, *stems: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-W", "ignore::RuntimeWarning"]
    command += [f"tests/interpreted/{stem}.py" for stem in stems]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout


def test_parity_in_the_interpreter() -> None:
    interpret("not full", "lora_linear")


@pytest.mark.full
def test_parity_in_the_interpreter_at_length() -> None:
    interpret("full", "lora_linear")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets")
def test_cpu_tensors_are_refused_where_nothing_interprets() -> None:
    import torch

    call = backends.Call("lora_linear", "cpu", *[torch.float32] * 3, 1, 8, 8, 4, 1)
    with pytest.raises(backends.BackendError, match="TRITON_INTERPRET=1"):
        backends.choose(call, "triton")
    merge = call._replace(op="merge", device="cuda", x_dtype=torch.bfloat16, weight_dtype=torch.bfloat16)
    assert backends.cannot_serve("triton", merge._replace(adapter_dtype=torch.float16)) is None
    assert "float64" in str(backends.cannot_serve("triton", merge._replace(adapter_dtype=torch.float64)))
    assert backends.cannot_serve("triton", call._replace(device="cuda")) is None
    for x, weight, word in ((torch.float64, torch.float64, "float64"), (torch.float16, torch.bfloat16, "in one call")):
        mix = call._replace(device="cuda", x_dtype=x, weight_dtype=weight)
        assert word in str(backends.cannot_serve("triton", mix))
