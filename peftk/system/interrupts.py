"""Delays Ctrl-C and other signals until a step is complete."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

# signals whose handlers users let raise: Ctrl-C, a timeout, a request to terminate
_SIGNALS = (signal.SIGINT, signal.SIGALRM, signal.SIGTERM)


class Deferred:
    """Signals that have arrived and are held back."""

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self.pending: list[tuple[int, FrameType | None]] = []

    def deliver(self) -> None:
        """Calls the handlers of the pending signals; they may raise."""
        while self.pending:
            number, frame = self.pending.pop(0)
            self.handlers[number](number, frame)

    def hold(self, number: int, frame: FrameType | None) -> None:
        self.pending.append((number, frame))

    def restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            if signal.getsignal(number) == self.hold:  # else another handler was set in the meantime
                signal.signal(number, handler)


_outermost: Deferred | None = None


@contextlib.contextmanager
def deferred() -> Iterator[Deferred]:
    """Holds back signals with Python handlers until `deliver` is called, or the outermost `deferred` ends.

    Does nothing in other threads: Python runs signal handlers only in the main thread.
    """
    global _outermost
    if threading.current_thread() is not threading.main_thread():
        yield Deferred()
        return
    if _outermost is not None:
        yield _outermost
        return
    signals = Deferred()
    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                signals.handlers[number] = handler
                signal.signal(number, signals.hold)
        _outermost = signals
        yield signals
    finally:
        _outermost = None
        try:
            signals.restore_handlers()
        finally:
            signals.restore_handlers()  # a restored handler may have run, and raised, during the first attempt
        signals.deliver()
