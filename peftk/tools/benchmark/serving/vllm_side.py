"""vLLM as a side: a process of the Python in PEFTK_VLLM_PYTHON, which has vLLM (docs/vllm.md), answers jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from peftk.tools.benchmark.peers import UnavailableError
from peftk.tools.benchmark.serving.others import last_line, processor_of
from peftk.tools.benchmark.serving.sides import Side, Tokens
from peftk.tools.benchmark.serving.traffic import Job
from peftk.tools.smollm2 import Language

PYTHON = "PEFTK_VLLM_PYTHON"


def why_not() -> str | None:
    """Why vLLM cannot be measured; None if it can."""
    python = os.environ.get(PYTHON)
    if not python:
        return f"{PYTHON} names no Python that has vLLM"
    return None if shutil.which(python) else f"{PYTHON} = {python} is no program"


def with_plugin(name: str, language: Language, folder: Path, names: Sequence[str]) -> Side:
    """vLLM with peftk's plug-in (`peftk.serve.engines.vllm`), which that Python must have."""
    return side(name, language, folder, names, plugin="peftk")


def without_adapters(name: str, language: Language, folder: Path, names: Sequence[str]) -> Side:
    """vLLM as it is without LoRA: on a CPU it compiles the model then. Jobs' adapters are not looked at."""
    return side(name, language, folder, ())


def side(name: str, language: Language, folder: Path, names: Sequence[str], *, plugin: str = "") -> Side:
    """A process of vLLM with LoRA, if there are adapters, and with one plug-in or none.

    Raises UnavailableError if vLLM does not start, or has no such plug-in.
    """
    model = tempfile.mkdtemp(prefix="peftk-vllm-")
    language.model.save_pretrained(model)
    asked = {"model": model, "adapters": {adapter: str(folder / adapter) for adapter in names}}
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": plugin,
    }
    environment.pop("PYTHONPATH", None)
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        [os.environ[PYTHON], Path(__file__).with_name("vllm_process.py"), json.dumps(asked)],
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment,
    )  # fmt: skip

    def read() -> str:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("peftk:"):
                return line.removeprefix("peftk:")
        said.seek(0)
        raise UnavailableError(f"vLLM has ended: {last_line(said.readlines())}")

    def answer(jobs: Sequence[Job]) -> list[Tokens]:
        assert process.stdin is not None
        process.stdin.write(json.dumps(jobs) + "\n")
        process.stdin.flush()
        return [tuple(tokens) for tokens in json.loads(read())]

    def close() -> None:
        process.communicate("")
        said.close()
        shutil.rmtree(model, ignore_errors=True)

    try:
        if json.loads(read())["plugin"] != bool(plugin):
            raise UnavailableError(f"the Python in {PYTHON} has no peftk")
    except UnavailableError:
        close()
        raise
    return Side(name, answer, close, lambda: processor_of(process.pid))
