"""Streams, events and captures of a GPU, for tests of what waits for what: banks of CPU tensors behave as on a GPU.

Nothing runs later: what a stream was given is only counted, and a test says how far it has come.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch

from peftk.adapters import live_table
from peftk.launch import workspace
from peftk.system import streams


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.place = stream, stream.given

    def query(self) -> bool:
        return self.place <= self.stream.done


class Stream:
    """What it was given are numbers; it has done those up to `done`."""

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.cuda_stream = next(self._numbers)
        self.given = self.done = 0
        self.captured = False
        self.waits: list[Event] = []

    def launch(self) -> None:
        self.given += 1

    def record_event(self) -> Event:
        assert not self.captured, "an event would become part of a graph"
        return Event(self)

    def wait_event(self, event: Event) -> None:
        assert not self.captured, "a wait would become part of a graph"
        self.waits.append(event)

    def waits_for(self, other: Stream) -> bool:
        """Whether it waits for all that the other stream has been given."""
        return any(event.stream is other and event.place == other.given for event in self.waits)

    def synchronize(self) -> None:
        assert not self.captured
        self.done = self.given


class Device:
    """The streams of a GPU that stands for the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = Stream()  # the current one
        self.waits = 0  # of the host for all of the device
        for name in ("_of_stream", "_of_capture", "_slabs"):
            monkeypatch.setattr(workspace, name, {})
        monkeypatch.setattr(workspace, "_taken", [])
        monkeypatch.setattr(live_table, "needed", lambda device: True)
        monkeypatch.setattr(streams, "current", lambda device: self.stream)
        monkeypatch.setattr(streams, "handle", lambda device: self.stream.cuda_stream)
        monkeypatch.setattr(streams, "using", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(streams, "capturing", lambda device: self.stream.captured)
        monkeypatch.setattr(streams, "is_captured", lambda stream: stream.captured)
        monkeypatch.setattr(streams, "wait_for_device", self._wait)
        monkeypatch.setattr(streams, "capture_number", lambda stream: stream.cuda_stream)

    def _wait(self, device: torch.device) -> None:
        self.waits += 1

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[Stream]:
        before, self.stream = self.stream, stream
        yield stream
        self.stream = before

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        with self.on(Stream()) as stream:
            stream.captured = True
            yield
            stream.captured = False
