"""llama.cpp as a side: its llama-server answers jobs over HTTP, a LoRA named by each request.

PEFTK_LLAMA_CPP names a folder of llama.cpp's sources, for its converters to GGUF, with llama-server built in build/bin,
or else found on the PATH. Model and adapters become GGUF in bf16, the dtype of the other sides.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peftk.tools.benchmark.peers import UnavailableError
from peftk.tools.benchmark.serving.others import last_line, processor_of
from peftk.tools.benchmark.serving.sides import Side, Tokens
from peftk.tools.benchmark.serving.traffic import Job
from peftk.tools.smollm2 import Language

SOURCES = "PEFTK_LLAMA_CPP"
_CONVERTERS = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_REQUEST_TOKENS = 256  # of prompt and answer
_START_SECONDS, _ANSWER_SECONDS = 120, 600


def why_not(language: Language) -> str | None:
    """Why llama.cpp cannot be measured; None if it can."""
    sources = os.environ.get(SOURCES)
    if not sources:
        return f"{SOURCES} names no folder of llama.cpp"
    missing = [name for name in _CONVERTERS if not Path(sources, name).is_file()]
    if missing:
        return f"{SOURCES} = {sources} has no {missing[0]}"
    if _server() is None:
        return f"no llama-server in {SOURCES}/build/bin, nor on the PATH"
    return None if language.tokenizer is not None else f"{language.name} has no tokenizer, which GGUF asks for"


def _server() -> str | None:
    return shutil.which("llama-server", path=f"{os.environ[SOURCES]}/build/bin") or shutil.which("llama-server")


def side(name: str, language: Language, folder: Path, names: Sequence[str]) -> Side:
    """A server with these adapters, and as many slots. Raises UnavailableError if it does not start."""
    with contextlib.ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peftk-llama-cpp-")))
        language.model.save_pretrained(made / "hf")
        language.tokenizer.save_pretrained(made / "hf")
        said = stack.enter_context((made / "said").open("w+"))
        model = _converted(_CONVERTERS[0], [made / "hf"], made / "model.gguf")
        adapters = [
            _converted(_CONVERTERS[1], [folder / adapter, "--base", made / "hf"], made / f"{adapter}.gguf")
            for adapter in names
        ]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = subprocess.Popen(
            [str(part) for part in (_server(), *_arguments(model, adapters, port, slots=len(names)))],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said,
        )  # fmt: skip
        stack.callback(_end, process)
        _wait(process, port, said)
        numbers: dict[str | None, int] = {adapter: number for number, adapter in enumerate(names)}
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(names)))

        def ask(job: Job) -> Tokens:
            # adapters that are not in the list are off; without a list all are on
            lora = [{"id": numbers.get(job.adapter, 0), "scale": float(job.adapter is not None)}]
            asked = {
                "prompt": job.prompt, "n_predict": job.new_tokens, "lora": lora, "temperature": 0, "ignore_eos": True,
                "return_tokens": True, "cache_prompt": False,
            }  # fmt: skip
            return tuple(_post(f"http://127.0.0.1:{port}/completion", asked)["tokens"])

        def answer(jobs: Sequence[Job]) -> list[Tokens]:
            return list(threads.map(ask, jobs))

        return Side(name, answer, stack.pop_all().close, lambda: processor_of(process.pid))


def _converted(converter: str, arguments: Sequence[object], to: Path) -> Path:
    """Runs one of llama.cpp's converters, which need transformers, gguf and sentencepiece."""
    command = [sys.executable, Path(os.environ[SOURCES], converter), *arguments, "--outtype", "bf16", "--outfile", to]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"{converter} has failed: {last_line(done.stderr.splitlines())}")
    return to


def _arguments(model: Path, adapters: Sequence[Path], port: int, *, slots: int) -> list[object]:
    threads = torch.get_num_threads()
    loras = [part for adapter in adapters for part in ("--lora", adapter)]
    return [
        *("--model", model, *loras, "--lora-init-without-apply"),
        *("--parallel", slots, "--ctx-size", slots * _REQUEST_TOKENS),
        *("--threads", threads, "--threads-batch", threads, "--threads-http", slots),
        *("--host", "127.0.0.1", "--port", port, "--offline"),
    ]


def _wait(process: subprocess.Popen[bytes], port: int, said: Any) -> None:
    """Until the server answers."""
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.1)
    said.seek(0)
    raise UnavailableError(f"llama-server did not start: {last_line(said.readlines())}")


def _post(url: str, asked: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as found:
            answer: dict[str, Any] = json.load(found)
            return answer
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"llama-server: {error.read().decode(errors='replace')}") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
