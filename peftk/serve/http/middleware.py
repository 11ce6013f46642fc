"""What happens to every request before and around its endpoint: keys, the body's limits, clients that leave, times."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peftk.serve.http.errors import APIError
from peftk.serve.http.limits import Limits
from peftk.serve.http.metrics import Metrics
from peftk.serve.http.security import Keys

_LEFT = 499  # the status under which metrics count requests whose clients have left


class Measured:
    """Counts and times requests by the endpoint that took them."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, status = time.perf_counter(), _LEFT

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.answered(route, status, time.perf_counter() - begin)


class Guarded:
    """Refuses requests without the right key, before anything of their bodies is read."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.keys.check(scope["path"], scope["headers"])
            except APIError as error:
                return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)


class Received:
    """Reads a request's body, within limits, and cancels what works on the request when its client leaves."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self.limits.body_seconds)
        except asyncio.TimeoutError:
            error = APIError(408, "The request's body took too long to arrive.", code="body_timeout")
            return await error.response()(scope, receive, send)
        except APIError as error:
            return await error.response()(scope, receive, send)
        if body is None:
            return  # the client has left
        unread, left = [body], asyncio.Event()

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            answering.cancel()

        answering = asyncio.ensure_future(self.app(scope, replay, send))
        watching = asyncio.ensure_future(watch())
        try:
            await answering
        except asyncio.CancelledError:
            if not left.is_set():
                raise
        finally:
            for task in (watching, answering):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client leaves. Raises APIError if it is too large."""
        most = self.limits.body_bytes
        too_large = APIError(413, f"Expected a body of at most {most} bytes.", code="body_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)
