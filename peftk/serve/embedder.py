"""Embedder: turns texts into vectors, many at once, each with an adapter of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftk.adapters import checks
from peftk.serve.adapter_store import AdapterStore, Lease
from peftk.serve.fair_queue import FairQueue
from peftk.serve.requests import QueueFullError, is_int, is_number

_RETRY = 0.005  # seconds after which a place in the bank is asked for again that a running batch still reads
_LOOK_AHEAD = 512  # waiting texts among which those of like length are looked for
POOLINGS = ("mean", "cls")


class Embeddings(NamedTuple):
    """Of the texts of a request. vectors: fp32 [n, D], in their order. digest: of the adapter's checkpoint."""

    vectors: Tensor
    tokens: int
    digest: str | None


@dataclasses.dataclass(frozen=True)
class EmbedderStats:
    """What an embedder does now and has done: texts by how they ended, their tokens, and batches of them."""

    waiting: int
    running: int
    finished: int
    cancelled: int
    timed_out: int
    failed: int
    prompt_tokens: int
    batches: int


@dataclasses.dataclass(eq=False)
class EmbeddingJob:
    """The texts of one request. `future` gets their Embeddings, or the error with which it fails."""

    texts: list[list[int]]
    adapter: str | None
    deadline: float | None
    future: Future[Embeddings] = dataclasses.field(default_factory=Future)
    lease: Lease | None = None
    vectors: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def cancel(self) -> None:
        """Ends it without a result, unless it has ended. What is in the running batch is computed, for nothing."""
        self.future.cancel()

    @property
    def tenant(self) -> str:
        return self.adapter or ""


class _Text(NamedTuple):
    job: EmbeddingJob
    place: int  # in the job

    @property
    def tokens(self) -> list[int]:
        return self.job.texts[self.place]


class Embedder:
    """Serves an encoder of transformers with the adapters of a store: waiting texts are embedded in batches.

        embedder = peftk.serve.Embedder(model, peftk.serve.AdapterStore(model, "adapters/"), tokenizer)
        embedder.embed(["a text", "another"], adapter="alice")  # Embeddings

    A batch is what waits when the one before has ended: of any adapters, in fair order over them, texts of like length
    together. A vector does not depend on the other texts, up to the rounding of sums whose order depends on the batch.

    Args:
        model: its output has `last_hidden_state` [B, T, D]; the embedder uses it alone until `close`.
        store: an AdapterStore of the same model.
        tokenizer: of transformers.
        pooling: "mean" over a text's tokens, or "cls", its first token. normalize: to unit length.
        max_tokens: of a text; longer ones are refused. None for what the model has positions for.
        batch_tokens: of a batch, padding included; a single text may have more.
        max_waiting: texts that wait at most.

    Raises TypeError or ValueError for a bad argument.

    Source: Reimers and Gurevych 2019 (Sentence-BERT) for the pooling.
    """

    def __init__(
        self,
        model: nn.Module,
        store: AdapterStore,
        tokenizer: Any,
        *,
        pooling: str = "mean",
        normalize: bool = True,
        max_tokens: int | None = None,
        batch_tokens: int = 4096,
        max_waiting: int = 4096,
    ) -> None:
        if store.server.model is not model:
            raise ValueError("store: expected an AdapterStore of this model, got one of another model")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        config: Any = model.config
        positions = getattr(config, "max_position_embeddings", None)
        self.max_tokens = max_tokens if max_tokens is not None else positions or batch_tokens
        for name, value in (
            ("max_tokens", self.max_tokens),
            ("batch_tokens", batch_tokens),
            ("max_waiting", max_waiting),
        ):
            checks.positive(name, value)
        if positions is not None and self.max_tokens > positions:
            raise ValueError(f"max_tokens: expected at most {positions}, the model's positions, got {max_tokens}")
        self.model, self.store, self.tokenizer = model, store, tokenizer
        self.pooling, self.normalize = pooling, normalize
        self.batch_tokens, self.max_waiting = batch_tokens, max_waiting
        self.dimensions: int = config.hidden_size
        self._vocabulary: int = config.vocab_size
        self._pad: int = getattr(config, "pad_token_id", None) or 0
        self._device = next(model.parameters()).device
        tokenizer("")  # takes off the truncation and padding of its file, which no thread may do beside another
        self._wake = threading.Condition(threading.RLock())
        self._waiting: FairQueue[_Text] = FairQueue()
        self._jobs: set[EmbeddingJob] = set()
        self._counts = dict.fromkeys(("finished", "cancelled", "timed_out", "failed", "prompt_tokens", "batches"), 0)
        self._running = 0
        self._open = True
        self._thread = threading.Thread(target=self._run, name="peftk-embedder", daemon=True)
        self._thread.start()

    # ---- for users

    def submit(
        self, texts: Sequence[str | Sequence[int]], adapter: str | None = None, timeout: float | None = None
    ) -> EmbeddingJob:
        """Hands in texts, or ids of tokens, and returns at once.

        adapter: a name of the store, None for the base model. timeout: seconds after which it fails with TimeoutError.

        Raises TypeError for other texts or another timeout, ValueError for an unknown adapter, no texts, an empty or
        too long one or ids outside of the vocabulary; QueueFullError if too many texts wait; RuntimeError after
        `close`. Nothing has changed then.
        """
        _check_types(texts, timeout)
        if adapter is not None and adapter not in self.store:
            raise ValueError(f"adapter: expected a name of the store or None, got {adapter!r}")
        ids = [self.tokenizer(text)["input_ids"] if isinstance(text, str) else list(text) for text in texts]
        if not ids:
            raise ValueError("texts: expected one or more, got none")
        for tokens in ids:
            if not 0 < len(tokens) <= self.max_tokens:
                raise ValueError(f"texts: expected 1 to {self.max_tokens} tokens each, got {len(tokens)}")
            if not all(0 <= token < self._vocabulary for token in tokens):
                raise ValueError(f"texts: expected tokens from 0 to {self._vocabulary - 1}, got others")
        job = EmbeddingJob(ids, adapter, None if timeout is None else time.monotonic() + timeout)
        with self._wake:
            if not self._open:
                raise RuntimeError("embedder: expected an open one, got one that was closed")
            if len(self._waiting) + len(ids) > self.max_waiting:
                raise QueueFullError(
                    f"embedder: expected at most max_waiting = {self.max_waiting} texts to wait, got {len(ids)} more"
                )
            if adapter is not None:
                job.lease = self.store.lease(adapter, on_cancel=job.cancel)
            self._jobs.add(job)
            for index in range(len(ids)):
                self._waiting.add(job.tenant, _Text(job, index))
            self._wake.notify_all()
        job.future.add_done_callback(lambda _: self._leave(job))
        if job.lease is not None:
            job.lease.loaded.add_done_callback(lambda _: self._notify())
        return job

    def embed(self, texts: Sequence[str | Sequence[int]], adapter: str | None = None) -> Embeddings:
        """The vectors of texts. Raises as `submit`, and whatever the load of the adapter raises."""
        return self.submit(texts, adapter).future.result()

    @property
    def alive(self) -> bool:
        """Whether it is open and its thread runs."""
        return self._open and self._thread.is_alive()

    def stats(self) -> EmbedderStats:
        """What it does now and has done."""
        with self._wake:
            return EmbedderStats(waiting=len(self._waiting), running=self._running, **self._counts)

    def close(self) -> None:
        """Cancels what waits, and ends."""
        with self._wake:
            self._open = False
            jobs = list(self._jobs)
            self._wake.notify_all()
        for job in jobs:
            job.cancel()
        self._thread.join()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- in its thread

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._open:
                    return
                batch = self._next_batch()
                if not batch:
                    self._wake.wait(self._until())
                    continue
                for text in batch:
                    self._waiting.remove(text.job.tenant, text)
                    self._waiting.served(text.job.tenant, len(text.tokens))
                self._running = len(batch)
            try:
                vectors = self._vectors(batch)
            except Exception as error:
                for job in {text.job for text in batch}:
                    self._finish(job, error)
            else:
                for text, vector in zip(batch, vectors.unbind(), strict=True):
                    text.job.vectors[text.place] = vector
                    if len(text.job.vectors) == len(text.job.texts):
                        self._finish(text.job)
            with self._wake:
                self._running = 0
                self._counts["batches"] += 1

    def _next_batch(self) -> list[_Text]:
        """The next texts: the first that is ready, and of those behind it the ones whose lengths are nearest."""
        now = time.monotonic()
        for job in [job for job in self._jobs if job.deadline is not None and job.deadline <= now]:
            self._finish(job, TimeoutError("texts: expected vectors before the timeout"))
        ready = [text for text in itertools.islice(iter(self._waiting), _LOOK_AHEAD) if self._pinned(text.job)]
        if not ready:
            return []
        first, *others = ready
        batch, longest = [first], len(first.tokens)
        for text in sorted(others, key=lambda text: abs(len(text.tokens) - len(first.tokens))):
            longest = max(longest, len(text.tokens))
            if longest * (len(batch) + 1) > self.batch_tokens:
                break
            batch.append(text)
        return batch

    def _pinned(self, job: EmbeddingJob) -> bool:
        """Whether the job's adapter is in the bank, to which it is brought here."""
        if job.future.done():
            return False
        if job.lease is None:
            return True
        try:
            return job.lease.pin()
        except Exception as error:
            self._finish(job, error)
            return False

    def _until(self) -> float | None:
        """Seconds after which to look again, if nobody notifies."""
        now = time.monotonic()
        ends = [job.deadline - now for job in self._jobs if job.deadline is not None]
        if any(job.lease is not None and job.lease.held is None for job in self._jobs):
            ends.append(_RETRY)
        return min(max(min(ends), 0.0), threading.TIMEOUT_MAX) if ends else None

    @torch.inference_mode()
    def _vectors(self, batch: Sequence[_Text]) -> Tensor:
        """fp32 [n, D] on the CPU."""
        length = max(len(text.tokens) for text in batch)
        ids = torch.full((len(batch), length), self._pad, dtype=torch.int64)
        mask = torch.zeros((len(batch), length), dtype=torch.int64)
        for row, text in enumerate(batch):
            ids[row, : len(text.tokens)] = torch.tensor(text.tokens)
            mask[row, : len(text.tokens)] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        digests = [None if text.job.lease is None else text.job.lease.digest for text in batch]
        with self.store.server.route(digests) if any(digests) else contextlib.nullcontext():
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask.unsqueeze(-1)
            pooled = torch.where(weights > 0, hidden, 0.0).sum(1) / weights.sum(1)
        return (F.normalize(pooled, dim=-1) if self.normalize else pooled).cpu()

    def _finish(self, job: EmbeddingJob, error: BaseException | None = None) -> None:
        with contextlib.suppress(Exception):  # it was cancelled meanwhile
            if error is not None:
                job.future.set_exception(error)
            else:
                vectors = torch.stack([job.vectors[index] for index in range(len(job.texts))])
                digest = None if job.lease is None else job.lease.digest
                job.future.set_result(Embeddings(vectors, sum(map(len, job.texts)), digest))

    def _leave(self, job: EmbeddingJob) -> None:
        """Takes an ended job out, wherever it is."""
        with self._wake:
            for index in range(len(job.texts)):
                self._waiting.remove(job.tenant, _Text(job, index))
            self._jobs.discard(job)
            outcome = "finished"
            if job.future.cancelled():
                outcome = "cancelled"
            elif job.future.exception() is not None:
                outcome = "timed_out" if isinstance(job.future.exception(), TimeoutError) else "failed"
            self._counts[outcome] += len(job.texts)
            if outcome == "finished":
                self._counts["prompt_tokens"] += sum(map(len, job.texts))
            if job.lease is not None:
                job.lease.release()
            self._wake.notify_all()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()


def _check_types(texts: Any, timeout: Any) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"texts: expected a sequence of texts, got {type(texts).__name__}")
    for text in texts:
        if not isinstance(text, str) and not (isinstance(text, Sequence) and all(map(is_int, text))):
            raise TypeError(f"texts: expected strings, or sequences of ints, got {text!r:.40}")
    if timeout is not None and not is_number(timeout):
        raise TypeError(f"timeout: expected seconds or None, got {timeout!r:.40}")
