"""`peftk serve`: from options to a running server."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import click
import torch

from peftk.serve.adapter_store import AdapterStore
from peftk.serve.embedder import Embedder
from peftk.serve.engine import Engine
from peftk.serve.http import loading, server
from peftk.serve.http.limits import Limits
from peftk.serve.http.security import Keys
from peftk.serve.http.served import Served

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command line, by their names there."""

    host: str
    port: int
    name: str | None
    dtype: str | None
    threads: int | None
    api_key_file: Path | None
    admin_token_file: Path | None
    bank_slots: int
    bank_bytes: int | None
    host_bytes: int
    max_running: int
    max_waiting: int
    cache_tokens: int
    step_tokens: int
    max_new_tokens: int
    max_prompt_tokens: int | None
    max_body: int
    max_connections: int
    request_seconds: float
    drain_seconds: float


def run(path: Path, adapters: Path | None, options: Options) -> None:
    """Serves a model until a signal ends it. Raises ValueError, OSError or ImportError for what it cannot serve."""
    limits = Limits(
        body_bytes=options.max_body,
        new_tokens=options.max_new_tokens,
        prompt_tokens=options.max_prompt_tokens,
        request_seconds=options.request_seconds,
        drain_seconds=options.drain_seconds,
        connections=options.max_connections,
    )
    keys = Keys(
        api=_secret(options.api_key_file, "PEFTK_API_KEY"),
        admin=_secret(options.admin_token_file, "PEFTK_ADMIN_TOKEN"),
    )
    with server.bind(options.host, options.port) as bound:
        if not server.is_local(bound) and not keys.guarded:
            click.echo(f"{server.url_of(bound)} is open to the network, without an API key.", err=True)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        served = _served(path, adapters, options)
        message = f"Serving {served.name} and {len(served.store.names)} adapters at {server.url_of(bound)}"
        server.run(served, bound, limits, keys, ready=lambda: click.echo(message))


def _served(path: Path, adapters: Path | None, options: Options) -> Served:
    loaded = loading.load(path, _DTYPES[options.dtype] if options.dtype else None)
    name = options.name or path.resolve().name.removesuffix(".gguf")
    store = AdapterStore(
        loaded.model,
        adapters,
        bank_slots=options.bank_slots,
        bank_bytes=options.bank_bytes,
        host_bytes=options.host_bytes,
    )
    if loaded.pooling is not None:
        embedder = Embedder(
            loaded.model,
            store,
            loaded.tokenizer,
            pooling=loaded.pooling.kind,
            normalize=loaded.pooling.normalize,
            max_tokens=loaded.pooling.max_tokens,
            batch_tokens=options.step_tokens,
            max_waiting=options.max_waiting,
        )
        return Served(name, store, embedder=embedder)
    engine = Engine(
        loaded.model,
        store,
        tokenizer=loaded.tokenizer,
        max_running=options.max_running,
        max_waiting=options.max_waiting,
        cache_tokens=options.cache_tokens,
        step_tokens=options.step_tokens,
    )
    return Served(name, store, engine=engine)


def _secret(file: Path | None, variable: str) -> str | None:
    """The contents of a file without the end of its line, else an environment variable. Raises OSError, ValueError."""
    if file is None:
        return os.environ.get(variable) or None
    return file.read_text(encoding="utf-8").strip()
