"""Generation: a request that an engine works on, as its owner sees it."""

from __future__ import annotations

import asyncio
import collections
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

from peftk.serve.requests import Completion, Request, Token


class Generation:
    """A submitted request: iterate over it, with `for` or `async for`, to get its tokens as they come.

        for token in engine.stream("Once", adapter="alice"):
            print(token.text, end="")

    A loop that is left early cancels the request. `result` waits for the end. Tokens are given to one loop only.
    """

    def __init__(self, request: Request, cancel: Callable[[Generation], None]) -> None:
        self.request = request
        self.submitted = time.monotonic()
        self._cancel = cancel
        self._changed = threading.Condition()
        self._tokens: collections.deque[Token] = collections.deque()
        self._completion: Completion | None = None
        self._error: BaseException | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def done(self) -> bool:
        """Whether it has ended, by itself, cancelled, or with an error."""
        return self._completion is not None or self._error is not None

    def cancel(self) -> None:
        """Ends the request with what it has. Does nothing after its end."""
        self._cancel(self)

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the end. Raises the error with which the request failed, TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"request: expected its end within {timeout} s")
            if self._error is not None:
                raise self._error
            assert self._completion is not None
            return self._completion

    def __iter__(self) -> Iterator[Token]:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._tokens or self.done)
                    token = self._next()
                if token is None:
                    return
                yield token
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Token]:
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        with self._changed:
            self._waiters.append(waiter)
        try:
            while True:
                with self._changed:
                    waiter[1].clear()
                    waiting = not self._tokens and not self.done
                    token = None if waiting else self._next()
                if waiting:
                    await waiter[1].wait()
                elif token is None:
                    return
                else:
                    yield token
        finally:
            self.cancel()

    def _next(self) -> Token | None:
        """The next token, None at the end. With the lock."""
        if self._tokens:
            return self._tokens.popleft()
        if self._error is not None:
            raise self._error
        return None

    # ---- for the engine

    def put(self, token: Token) -> None:
        """Gives the owner a token."""
        with self._changed:
            self._tokens.append(token)
            self._notify()

    def end(self, outcome: Completion | BaseException) -> None:
        """Ends it, with a Completion or an error. Only the first end counts."""
        with self._changed:
            if not self.done:
                if isinstance(outcome, BaseException):
                    self._error = outcome
                else:
                    self._completion = outcome
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for loop, event in self._waiters:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # its loop was closed
                continue
