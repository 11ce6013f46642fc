"""uvicorn's HTTP/1.1 with two more timeouts: for a request's head, and for an answer that nobody reads."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from peftk.serve.http.limits import Limits


def timed_protocol(limits: Limits) -> type[H11Protocol]:
    """A protocol for `uvicorn.Config(http=…)` that cuts connections of clients that are slower than the limits."""

    class TimedProtocol(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait_for_head()

        def _wait_for_head(self) -> None:
            awaited = self.cycle is None or self.cycle.response_complete
            if awaited and self._head is None and self.timeout_keep_alive_task is None:
                self._head = self.loop.call_later(limits.head_seconds, self.transport.abort)
            elif not awaited:
                _stop(self._head)
                self._head = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(limits.send_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _stop(self._unread)

        def connection_lost(self, exc: Exception | None) -> None:
            _stop(self._head)
            _stop(self._unread)
            super().connection_lost(exc)

    return TimedProtocol


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
