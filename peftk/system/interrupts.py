"""Ctrl-C at a moment of our choosing: between two steps of which each is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

# what a user's handler may raise from: Ctrl-C, a timeout, a request to end
_SIGNALS = (signal.SIGINT, signal.SIGALRM, signal.SIGTERM)


class Deferred:
    """The signals that came and wait."""

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self.waiting: list[tuple[int, FrameType | None]] = []

    def deliver(self) -> None:
        """Calls the handlers of what has come, here; they may raise."""
        while self.waiting:
            number, frame = self.waiting.pop(0)
            self.handlers[number](number, frame)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.waiting.append((number, frame))

    def put_back(self) -> None:
        for number, handler in self.handlers.items():
            if signal.getsignal(number) == self.note:  # else somebody has set another meanwhile
                signal.signal(number, handler)


_outermost: Deferred | None = None


@contextlib.contextmanager
def deferred() -> Iterator[Deferred]:
    """Inside, signals with handlers in Python wait until somebody calls `deliver`, or the outermost `deferred` ends.

    Other threads than the main one get no signals in Python: for them nothing changes.
    """
    global _outermost
    if threading.current_thread() is not threading.main_thread():
        yield Deferred()
        return
    if _outermost is not None:
        yield _outermost
        return
    mine = Deferred()
    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                mine.handlers[number] = handler
                signal.signal(number, mine.note)
        _outermost = mine
        yield mine
    finally:
        _outermost = None
        try:
            mine.put_back()
        finally:
            mine.put_back()  # a handler that was put back may have raised just then
        mine.deliver()
