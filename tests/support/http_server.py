"""A real `peftk serve` in a process of its own, with the tiny Llama of served_llama or a tiny encoder."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from peftk.serve import AdapterStore, Engine
from peftk.serve.http import server as http
from peftk.serve.http.limits import Limits
from peftk.serve.http.security import Keys
from peftk.serve.http.served import Served
from tests.support import served_llama
from tests.support.paths import ROOT

ADMIN = "admin-token-of-tests"
TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('an unknown role') }}{% endif %}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %} w3{% endif %}"
)


def write_model(folder: pathlib.Path) -> None:
    """The tiny Llama with its tokenizer and a chat template: the texts of all messages, then w3."""
    served_llama.model().save_pretrained(folder)
    tokenizer = served_llama.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


class Running:
    """A running server. url: where. It has either a process or, in this one, uvicorn's server."""

    def __init__(
        self, url: str, *, process: subprocess.Popen[str] | None = None, server: http.Server | None = None
    ) -> None:
        self.url, self.process, self.server = url, process, server

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def call(self, path: str, body: Any = None, *, token: str | None = None, timeout: float = 20) -> tuple[int, Any]:
        """Status and answer, JSON where it is. body: to POST, None for GET."""
        status, _, answer = self.call_all(path, body, token=token, timeout=timeout)
        return status, answer

    def call_all(
        self, path: str, body: Any = None, *, token: str | None = None, timeout: float = 20
    ) -> tuple[int, dict[str, str], Any]:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, got, text = answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            status, got, text = error.code, dict(error.headers), error.read()
        lower = {name.lower(): value for name, value in got.items()}
        return status, lower, json.loads(text) if "json" in lower.get("content-type", "") else text.decode()

    def metrics(self) -> dict[str, float]:
        """All samples of /metrics by name with labels, parsed by Prometheus' own parser."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.call("/metrics")[1])
        return {
            sample.name + "".join(f",{name}={value}" for name, value in sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=20)


@contextlib.contextmanager
def command(*arguments: str | pathlib.Path, env: dict[str, str] | None = None) -> Iterator[Running]:
    """`peftk serve` on a free port, until the block ends."""
    words = [sys.executable, "-m", "peftk.cli", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    own = {"PEFTK_FIRST_USE": "0", "PEFTK_ADMIN_TOKEN": ADMIN, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        words, env={**os.environ, **own, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r" at (http://\S+)", line)
        assert found, f"{line}\n{process.communicate(timeout=20)}"
        yield Running(found[1], process=process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=20)


@contextlib.contextmanager
def in_thread(served: Served, limits: Limits | None = None, keys: Keys | None = None) -> Iterator[Running]:
    """The same server in a thread of this process, until the block ends."""
    bound, ready = http.bind("127.0.0.1", 0), threading.Event()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that what nobody reads is soon too much
    server = http.Server(served, limits or Limits(), keys or Keys(admin=ADMIN), ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert ready.wait(20)
        yield Running(http.url_of(bound), server=server)
    finally:
        server.should_exit = True
        thread.join(20)
        bound.close()
        assert not thread.is_alive()


def llama(adapters: pathlib.Path | None, **sizes: int) -> Served:
    """The tiny Llama under the name "base", with the adapters of a folder. sizes: of the engine and the store."""
    model = served_llama.model()
    tokenizer = served_llama.tokenizer()
    tokenizer.chat_template = TEMPLATE
    store = AdapterStore(model, adapters, bank_slots=sizes.pop("bank_slots", 64))
    return Served("base", store, engine=Engine(model, store, tokenizer=tokenizer, **sizes))


def body(adapter: str, prompt: Any = (5, 6, 7), new: int = 8, **fields: Any) -> dict[str, Any]:
    """Of a greedy completion."""
    prompt = prompt if isinstance(prompt, str) else list(prompt)
    greedy = {"model": adapter, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
    return {**greedy, **fields}


def text_alone(path: pathlib.Path | None, prompt: tuple[int, ...] = (5, 6, 7), new: int = 8) -> str:
    """The text that an adapter generates alone."""
    tokens = served_llama.alone(path, prompt, new)
    return str(served_llama.tokenizer().decode(tokens, skip_special_tokens=True))


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Waits; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
