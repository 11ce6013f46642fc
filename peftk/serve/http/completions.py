"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from peftk.serve.engine import Engine
from peftk.serve.generation import Generation
from peftk.serve.http import errors, wire
from peftk.serve.http.errors import APIError
from peftk.serve.http.limits import Limits
from peftk.serve.http.metrics import Metrics
from peftk.serve.http.served import Served
from peftk.serve.requests import Completion, Request, Token

_Events = AsyncIterator[tuple[int, Token | Completion]]


def router(served: Served, limits: Limits, metrics: Metrics) -> APIRouter:
    assert served.engine is not None
    routes, engine = APIRouter(), served.engine

    @routes.post("/v1/completions")
    async def completions(body: wire.CompletionBody) -> Response:
        adapter, prompts = served.adapter(body.model), wire.several(body.prompt)
        if len(prompts) > limits.prompts:
            raise APIError(400, f"prompt: expected at most {limits.prompts}, got {len(prompts)}", param="prompt")

        def requests() -> list[Request]:
            ids = [_ids(engine, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
            return [_request(engine, limits, body, adapter, tokens, body.max_tokens) for tokens in ids]

        return await _answer(wire.COMPLETION, body, served, metrics, requests)

    @routes.post("/v1/chat/completions")
    async def chat(body: wire.ChatBody) -> Response:
        adapter = served.adapter(body.model)
        messages = [{"role": message.role, "content": message.text} for message in body.messages]

        def requests() -> list[Request]:
            tokens = _chat_ids(engine, messages)
            most = body.max_completion_tokens or body.max_tokens
            return [_request(engine, limits, body, adapter, tokens, most)]

        return await _answer(wire.CHAT, body, served, metrics, requests)

    return routes


# ---- from a body to requests of the engine


def _ids(engine: Engine, text: str, *, special: bool = True) -> list[int]:
    found: list[int] = engine.tokenizer(text, add_special_tokens=special)["input_ids"]
    return found


def _chat_ids(engine: Engine, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation in the model's template, up to where the assistant's answer begins."""
    from jinja2.exceptions import TemplateError

    if not engine.tokenizer.chat_template:
        raise APIError(400, "This model has no chat template; use /v1/completions.", code="no_chat_template")
    try:
        text = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise APIError(400, f"messages: the model's chat template refuses them: {error}", param="messages") from error
    return _ids(engine, text, special=False)


def _request(
    engine: Engine, limits: Limits, body: Any, adapter: str | None, tokens: Sequence[int], most: int | None
) -> Request:
    """most: new tokens; None for as many as there is room for."""
    room = engine.room
    if limits.prompt_tokens is not None and len(tokens) > limits.prompt_tokens:
        message = f"Expected at most {limits.prompt_tokens} tokens in a prompt, got {len(tokens)}."
        raise APIError(400, message, code="context_length_exceeded")
    if most is not None and most > limits.new_tokens:
        message = f"max_tokens: expected at most {limits.new_tokens}, got {most}"
        raise APIError(400, message, param="max_tokens")
    if len(tokens) + (most or 1) > room:
        message = f"Expected at most {room} tokens with those to generate, got {len(tokens)} + {most or 1}."
        raise APIError(400, message, code="context_length_exceeded")
    return Request(
        tokens,
        adapter=adapter,
        max_new_tokens=most or min(limits.new_tokens, room - len(tokens)),
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stop=body.stops,
        ignore_eos=body.ignore_eos,
        timeout=min(limits.request_seconds, body.timeout or limits.request_seconds),
    )


async def _submitted(served: Served, model: str, requests: Callable[[], list[Request]]) -> list[Generation]:
    """All requests handed in, or none. In a thread, as tokenizing a long prompt takes a while."""

    def submit() -> list[Generation]:
        assert served.engine is not None
        generations: list[Generation] = []
        try:
            generations += map(served.engine.submit, requests())
        except BaseException as error:
            _cancel(generations)
            raise served.error(error, model) from error
        return generations

    work = asyncio.get_running_loop().run_in_executor(None, submit)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:  # the client has left meanwhile; the thread goes on
        work.add_done_callback(lambda done: None if done.exception() else _cancel(done.result()))
        raise


def _cancel(generations: Sequence[Generation]) -> None:
    for generation in generations:
        generation.cancel()


# ---- from generations to an answer


async def _answer(
    kind: wire.Kind, body: Any, served: Served, metrics: Metrics, requests: Callable[[], list[Request]]
) -> Response:
    generations = await _submitted(served, body.model, requests)
    events = _events(generations, served, body.model, metrics)
    head = kind.head(body.model, stream=body.stream)
    if body.stream:
        return await _EventStream.begin(_chunks(kind, head, events, len(generations), body.stream_options))
    completions: dict[int, Completion] = {}
    async for index, event in events:
        if isinstance(event, Completion):
            completions[index] = event
    ordered = [completions[index] for index in range(len(generations))]
    choices = [kind.choice(i, done.text, done.finish_reason) for i, done in enumerate(ordered)]
    return JSONResponse({**head, "choices": choices, "usage": _usage(ordered)})


async def _events(generations: Sequence[Generation], served: Served, model: str, metrics: Metrics) -> _Events:
    """The tokens of generations as they come, each with its generation's index, and at last each's Completion.

    Raises APIError as soon as one fails. When the loop over it ends, however it does, all are cancelled.
    """
    queue: asyncio.Queue[tuple[int, Token | Completion | BaseException]] = asyncio.Queue()

    async def pump(index: int, generation: Generation) -> None:
        try:
            async for token in generation:
                queue.put_nowait((index, token))
            queue.put_nowait((index, generation.result(0)))
        except Exception as error:
            queue.put_nowait((index, error))

    pumps = [asyncio.ensure_future(pump(index, generation)) for index, generation in enumerate(generations)]
    try:
        left = len(generations)
        while left:
            index, event = await queue.get()
            if isinstance(event, BaseException):
                raise served.error(event, model) from event
            if isinstance(event, Completion):
                left -= 1
                metrics.completed(event)
                _check_ended(event)
            yield index, event
    finally:
        _cancel(generations)
        for task in pumps:
            task.cancel()


def _check_ended(completion: Completion) -> None:
    """Raises APIError unless the model, a stop string or max_tokens has ended it."""
    if completion.finish_reason == "timeout":
        raise errors.of(TimeoutError())
    if completion.finish_reason == "cancelled":
        raise APIError(503, "The request was cancelled by the server.", code="cancelled")


async def _chunks(
    kind: wire.Kind, head: dict[str, Any], events: _Events, count: int, options: wire.StreamOptions
) -> AsyncIterator[str]:
    """Server-sent events with the tokens' texts. An error after the first is the last of them."""
    done: list[Completion] = []
    rest = {"usage": None} if options.include_usage else {}

    def chunk(*choices: dict[str, Any]) -> str:
        return _data({**head, "choices": list(choices), **rest})

    began = False
    try:
        async for index, event in events:
            if not began and kind.chat:
                yield chunk(kind.part(index, "", first=True))
            began = True
            if isinstance(event, Completion):
                done.append(event)
                yield chunk(kind.part(index, None, event.finish_reason))
            elif event.text:
                yield chunk(kind.part(index, event.text))
    except APIError as error:
        if not began:
            raise
        yield _data(error.body)
    else:
        if options.include_usage:
            yield _data({**head, "choices": [], "usage": _usage(done)})
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # an async generator
    yield "data: [DONE]\n\n"


def _data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _usage(completions: Sequence[Completion]) -> dict[str, int]:
    return wire.usage(sum(c.prompt_tokens for c in completions), sum(len(c.tokens) for c in completions))


class _EventStream(StreamingResponse):
    """Server-sent events. What they come from is closed when the answer ends, however it does."""

    media_type = "text/event-stream"

    @classmethod
    async def begin(cls, chunks: AsyncIterator[str]) -> _EventStream:
        """Waits for the first chunk, so that an error before it is an answer with that error's status."""
        first = await anext(chunks)

        async def all_chunks() -> AsyncIterator[str]:
            try:
                yield first
                async for chunk in chunks:
                    yield chunk
            finally:
                await chunks.aclose()  # type: ignore[attr-defined]  # an async generator

        return cls(all_chunks(), headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]  # an async generator
