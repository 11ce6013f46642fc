"""Engine: generates text for many requests at once, each with an adapter of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftk.adapters import checks
from peftk.models.server import HeldAdapter
from peftk.serve.adapter_store import AdapterStore, Lease
from peftk.serve.continuous import PAGE_TOKENS, ContinuousBatching, Output, Sizes, Step
from peftk.serve.fair_queue import FairQueue
from peftk.serve.generation import Generation
from peftk.serve.requests import Completion, QueueFullError, Request, Token
from peftk.serve.sampling import Sampler, sample
from peftk.serve.text import TextStream

_RETRY = 0.005  # seconds after which a place in the bank is asked for again that a running step still reads


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine does now, and what it has done: requests by how they ended, tokens."""

    waiting: int
    running: int
    finished: int
    cancelled: int
    timed_out: int
    failed: int
    prompt_tokens: int
    generated_tokens: int


@dataclasses.dataclass(eq=False)
class _Work:
    """A request as the engine sees it."""

    id: str
    request: Request
    generation: Generation
    prompt: Sequence[int]
    text: TextStream
    lease: Lease | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    parts: list[str] = dataclasses.field(default_factory=list)
    started: float | None = None
    first_token: float | None = None

    @property
    def tenant(self) -> str:
        return self.request.tenant or self.request.adapter or ""

    @property
    def reserved(self) -> int:
        """Tokens of the KV cache, in whole pages."""
        return -(-(len(self.prompt) + self.request.max_new_tokens) // PAGE_TOKENS) * PAGE_TOKENS

    @property
    def deadline(self) -> float | None:
        timeout = self.request.timeout
        return None if timeout is None else self.generation.submitted + timeout


class Engine:
    """Serves a causal language model of transformers with the adapters of a store, by continuous batching.

        store = peftk.serve.AdapterStore(model, "adapters/")
        with peftk.serve.Engine(model, store, tokenizer=tokenizer) as engine:
            completions = engine.generate([Request("Once", adapter="alice"), Request("Once")])
            for token in engine.stream("Once upon", adapter="bob"):
                print(token.text, end="")

    Requests come and go between steps of the model; in each step every token uses the adapter of its request. What one
    request gets does not depend on the others: its sampling has random numbers of its own, and its tokens are those of
    its adapter alone, up to the rounding of sums whose order depends on the batch; without that too within
    `peftk.deterministic(batch_invariant=True)` around the making of the engine, on a CPU (docs/serving.md).

    Args:
        model: of transformers, in its place; the engine uses it alone until `close`.
        store: an AdapterStore of the same model; None for one without adapters.
        tokenizer: of transformers, a fast one; None if prompts are ids of tokens and no text is wanted.
        max_running: the most requests that are generated at a time. max_waiting: the most that wait for that.
        cache_tokens: room of the KV cache, in tokens; each running request has room for its prompt and max_new_tokens.
        step_tokens: the most tokens that one step computes; longer prompts take several steps.

    Raises TypeError or ValueError for a bad argument, ImportError if transformers is older than 5.24 or too new.
    """

    def __init__(
        self,
        model: nn.Module,
        store: AdapterStore | None = None,
        *,
        tokenizer: Any = None,
        max_running: int = 64,
        max_waiting: int = 1024,
        cache_tokens: int = 32768,
        step_tokens: int = 1024,
    ) -> None:
        for name, value in (
            ("max_running", max_running),
            ("max_waiting", max_waiting),
            ("cache_tokens", cache_tokens),
            ("step_tokens", step_tokens),
        ):
            checks.positive(name, value)
        if not hasattr(model, "init_continuous_batching"):
            raise TypeError(f"model: expected one of transformers that generates, got {type(model).__name__}")
        if tokenizer is not None and not hasattr(tokenizer, "backend_tokenizer"):
            raise TypeError(f"tokenizer: expected a fast one of transformers, got {type(tokenizer).__name__}")
        if store is not None and store.server.model is not model:
            raise ValueError("store: expected an AdapterStore of this model, got one of another model")
        self._owns_store = store is None
        self.model, self.tokenizer = model, tokenizer
        self.store = AdapterStore(model) if store is None else store
        self.max_running, self.max_waiting, self.cache_tokens = max_running, max_waiting, cache_tokens
        config: Any = model.config
        config = config.get_text_config()
        self._vocabulary: int = config.vocab_size
        self._context: int | None = getattr(config, "max_position_embeddings", None)
        self._end_tokens = _end_tokens(model, tokenizer)
        self._device = next(model.parameters()).device
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._waiting: FairQueue[_Work] = FairQueue()
        self._running: dict[str, _Work] = {}
        self._works: dict[Generation, _Work] = {}
        # read by the model's thread, without the lock: where the adapter of a request is, and how its tokens are chosen
        self._places: dict[str, HeldAdapter] = {}
        self._samplers: dict[str, Sampler] = {}
        self._counts = dict.fromkeys(
            ("finished", "cancelled", "timed_out", "failed", "prompt_tokens", "generated_tokens"), 0
        )
        self._numbers = itertools.count()
        self._open, self._stopping = True, False
        sizes = Sizes(cache_tokens, step_tokens, min(max_running, step_tokens))
        self._batching = ContinuousBatching(model, sizes, self._around, self._sample)
        self._threads = [
            threading.Thread(target=self._admit_forever, name="peftk-admission", daemon=True),
            threading.Thread(target=self._deliver_forever, name="peftk-outputs", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # ---- for users

    def submit(self, request: Request) -> Generation:
        """Hands in a request and returns at once.

        Raises ValueError for an unknown adapter, a prompt that is too long or has ids outside of the vocabulary, or
        text without a tokenizer; QueueFullError if too many requests wait; RuntimeError after `close` or if the model's
        thread has died. Nothing has changed then. What fails later, as a damaged checkpoint, is raised by the
        Generation.
        """
        return self._enqueue(self._work(request), wait=False)

    def stream(self, prompt: Request | str | Sequence[int], **options: Any) -> Generation:
        """Hands in a request; the Generation gives its tokens to `for` or `async for`. options: fields of a Request."""
        return self.submit(_request(prompt, options))

    def generate(self, requests: Iterable[Request | str | Sequence[int]], **options: Any) -> list[Completion]:
        """Completes all requests, in their order; waits while the queue is full. options: fields for prompts.

        Raises as `submit` before anything was generated; the first error of a request when all have ended.
        """
        works = [self._work(_request(request, options)) for request in requests]
        generations: list[Generation] = []
        try:
            generations += (self._enqueue(work, wait=True) for work in works)
            for generation in generations:
                with contextlib.suppress(Exception):
                    generation.result()
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise
        return [generation.result() for generation in generations]

    @property
    def alive(self) -> bool:
        """Whether it is open and the model's thread runs."""
        return self._open and self._batching.running

    @property
    def room(self) -> int:
        """The most tokens that a prompt can have, together with those to generate."""
        return min(self.cache_tokens // PAGE_TOKENS * PAGE_TOKENS, self._context or self.cache_tokens)

    def stats(self) -> EngineStats:
        """What it does now and has done. The adapters' are in `store.stats()`."""
        with self._lock:
            return EngineStats(waiting=len(self._waiting), running=len(self._running), **self._counts)

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests, and ends.

        Args:
            drain: let the requests that are there finish, for `timeout` seconds at most (None: as long as it takes);
                False cancels them.

        The model is as it was, except that its linears are MultiLoRALinears.
        """
        with self._wake:
            self._open = False
            if drain:
                self._wake.wait_for(lambda: not self._works or not self._batching.running, timeout)
            for work in list(self._works.values()):
                self._end(work, "cancelled")
            if self._stopping:
                return
            self._stopping = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        self._batching.stop()
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.close(drain=kind is None)

    # ---- from a request to the queue

    def _work(self, request: Request) -> _Work:
        """A request with its tokens, checked."""
        if not isinstance(request, Request):
            raise TypeError(f"request: expected a Request, got {type(request).__name__}")
        if self.tokenizer is None and (isinstance(request.prompt, str) or request.stop):
            raise ValueError("tokenizer: expected one for a prompt that is text, or for stop strings, got None")
        if request.adapter is not None and request.adapter not in self.store:
            raise ValueError(f"adapter: expected a name of the store or None, got {request.adapter!r}")
        prompt = request.prompt
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if not tokens or not all(0 <= token < self._vocabulary for token in tokens):
            raise ValueError(f"prompt: expected tokens from 0 to {self._vocabulary - 1}, got others, or none")
        total = len(tokens) + request.max_new_tokens
        if total > self.room:
            raise ValueError(
                f"prompt: expected at most {self.room} tokens together with max_new_tokens, got {len(tokens)} + "
                f"{request.max_new_tokens}"
            )
        generation = Generation(request, self._cancel)
        text = TextStream(self.tokenizer, request.stop)
        return _Work(f"peftk-{next(self._numbers)}", request, generation, tokens, text)

    def _enqueue(self, work: _Work, *, wait: bool) -> Generation:
        with self._wake:
            if wait:
                self._wake.wait_for(lambda: len(self._waiting) < self.max_waiting or not self._open)
            self._check_open()
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(
                    f"engine: expected fewer than max_waiting = {self.max_waiting} requests to wait, got as many"
                )
            work.generation.submitted = time.monotonic()
            self._works[work.generation] = work
            self._waiting.add(work.tenant, work)
            self._wake.notify_all()
        return work.generation

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("engine: expected an open one, got one that was closed")
        if not self._batching.running:
            raise RuntimeError(
                "engine: expected the model's thread to run, got one that has ended"
            ) from self._batching.failure()

    def _cancel(self, generation: Generation) -> None:
        with self._lock:
            work = self._works.get(generation)
            if work is not None:
                self._end(work, "cancelled")

    # ---- from the queue to the model

    def _admit_forever(self) -> None:
        with self._wake:
            while not self._stopping:
                self._wake.wait(self._admit())

    def _admit(self) -> float:
        """Ends what is overdue, starts what can start; returns the seconds after which to look again at the latest."""
        now = time.monotonic()
        for work in [w for w in self._works.values() if w.deadline is not None and w.deadline <= now]:
            self._end(work, "timeout")
        full = retry = False
        for work in list(itertools.islice(self._waiting, 2 * self.max_running)):
            if not self._prefetched(work):
                continue
            room = sum(running.reserved for running in self._running.values()) + work.reserved <= self.cache_tokens
            full |= not room or len(self._running) >= self.max_running
            if full:
                continue  # but those behind may begin to load
            try:
                if work.lease is None or work.lease.pin():
                    self._start(work)
                elif work.lease.loaded.done():
                    full = retry = True  # the bank has no place; who came later does not take the next one
                else:
                    self._look_again_after(work.lease)  # it left memory while it waited, and is read again
            except Exception as error:
                self._fail(work, error)
        deadlines = [w.deadline for w in self._works.values() if w.deadline is not None]
        until = [max(min(deadlines) - time.monotonic(), 0.0)] if deadlines else []
        return min([*until, *([_RETRY] if retry else []), threading.TIMEOUT_MAX])

    def _prefetched(self, work: _Work) -> bool:
        """Whether a waiting request's adapter is in memory; its load begins here."""
        if work.request.adapter is None:
            return True
        try:
            if work.lease is None:
                work.lease = self.store.lease(work.request.adapter, on_cancel=work.generation.cancel)
                self._look_again_after(work.lease)
        except Exception as error:
            self._fail(work, error)
            return False
        return work.lease.loaded.done()

    def _look_again_after(self, lease: Lease) -> None:
        """Wakes the admission when the lease's adapter is in memory."""
        lease.loaded.add_done_callback(lambda _: self._notify())

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _start(self, work: _Work) -> None:
        self._waiting.remove(work.tenant, work)
        self._waiting.served(work.tenant, len(work.prompt) + work.request.max_new_tokens)
        self._running[work.id] = work
        work.started = time.monotonic()
        if work.lease is not None and work.lease.held is not None:
            self._places[work.id] = work.lease.held
        self._samplers[work.id] = Sampler(work.request, self._device)
        end_tokens = () if work.request.ignore_eos else self._end_tokens
        self._counts["prompt_tokens"] += len(work.prompt)
        self._batching.add(work.id, work.prompt, work.request.max_new_tokens, end_tokens)
        self._wake.notify_all()  # there is a place in the queue

    # ---- in the model's thread

    def _around(self, step: Step) -> contextlib.AbstractContextManager[None]:
        """A route for the tokens of a step; none if all are the base model's."""
        held = [self._places.get(request.id) for request in step.requests]
        if not any(held):
            return contextlib.nullcontext()
        count = self.store.bank_slots
        slots = [-1 if place is None else place.number % count for place in held]
        tokens = [slot for slot, request in zip(slots, step.requests, strict=True) for _ in range(request.tokens)]
        ids = torch.tensor([tokens], dtype=torch.int32, device=self._device)
        places = [place for place in held if place is not None]
        return self.store.server.route_tokens(ids, places, picked=ids[0, step.picked.long()])

    def _sample(self, logits: Tensor, ids: Sequence[str]) -> Tensor:
        return sample(logits, [self._samplers.get(id) for id in ids])

    # ---- from the model to the owner

    def _deliver_forever(self) -> None:
        while not self._stopping:
            output = self._batching.next_output(0.1)
            if output is not None:
                with self._lock:
                    work = self._running.get(output.id)
                    if work is not None:  # else it has ended, by a stop string or its owner
                        try:
                            self._deliver(work, output)
                        except Exception as error:
                            self._fail(work, error)
            elif not self._batching.running and not self._stopping:
                self._recover()

    def _recover(self) -> None:
        """Starts the model's thread again, which a step has ended. What ran in it fails, what waits goes on."""
        with self._lock:
            reason = self._batching.failure()
            for work in list(self._running.values()):
                error = RuntimeError(f"engine: expected the model to run, got {reason!r}")
                error.__cause__ = reason
                self._fail(work, error)
            self._batching.stop()
            try:
                self._batching.start()
            except Exception as error:
                self._open = False
                for work in list(self._works.values()):
                    self._fail(work, error)

    def _deliver(self, work: _Work, output: Output) -> None:
        if output.error is not None:
            self._fail(work, RuntimeError(f"request: expected the model to compute it, got {output.error}"))
            return
        if self._samplers[work.id].lost:
            self._fail(work, RuntimeError("request: expected finite logits of the model, got NaN or infinite ones"))
            return
        for token in output.tokens[len(work.tokens) :]:
            work.first_token = work.first_token or time.monotonic()
            work.tokens.append(token)
            self._counts["generated_tokens"] += 1
            ends = token in self._end_tokens and not work.request.ignore_eos
            self._give(work, Token(token, work.text.add(token)))
            if work.text.stopped or ends or len(work.tokens) >= work.request.max_new_tokens:
                self._end(work, "stop" if work.text.stopped or ends else "length", in_model=not output.finished)
                return

    def _give(self, work: _Work, token: Token) -> None:
        work.parts.append(token.text)
        work.generation.put(token)

    def _end(self, work: _Work, reason: str, *, in_model: bool = True) -> None:
        left = work.text.finish()
        if left:
            self._give(work, Token(None, left))
        now, began = time.monotonic(), work.generation.submitted
        completion = Completion(
            request=work.request,
            text="".join(work.parts),
            tokens=tuple(work.tokens),
            finish_reason=reason,
            prompt_tokens=len(work.prompt),
            digest=None if work.lease is None else work.lease.digest,
            queued=(work.started or now) - began,
            to_first_token=None if work.first_token is None else work.first_token - began,
            total=now - began,
        )
        self._counts[{"cancelled": "cancelled", "timeout": "timed_out"}.get(reason, "finished")] += 1
        self._leave(work, in_model=in_model)
        work.generation.end(completion)

    def _fail(self, work: _Work, error: BaseException) -> None:
        self._counts["failed"] += 1
        self._leave(work, in_model=True)
        work.generation.end(error)

    def _leave(self, work: _Work, *, in_model: bool) -> None:
        """Takes a request out, wherever it is. A step that still has it computes it with the base model."""
        self._works.pop(work.generation, None)
        self._waiting.remove(work.tenant, work)
        if self._running.pop(work.id, None) is not None and in_model:
            self._batching.cancel(work.id)
        self._places.pop(work.id, None)
        self._samplers.pop(work.id, None)
        if work.lease is not None:
            work.lease.release()
        self._wake.notify_all()


def _request(prompt: Request | str | Sequence[int], options: dict[str, Any]) -> Request:
    if isinstance(prompt, Request):
        return dataclasses.replace(prompt, **options) if options else prompt
    return Request(prompt, **options)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids at which a text ends: those of the generation config, else of the config, else of the tokenizer."""
    owners = (getattr(model, "generation_config", None), model.config, tokenizer)
    found = next((ids for owner in owners if (ids := getattr(owner, "eos_token_id", None)) is not None), None)
    return frozenset(() if found is None else [found] if isinstance(found, int) else found)
