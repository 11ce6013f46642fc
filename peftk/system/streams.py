"""The order of writes and launches on a device: over its streams, and over CUDA graphs.

A CPU has no streams: `current` is None there, and everything below does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator

import torch


def current(device: torch.device) -> torch.cuda.Stream | None:
    """torch's current stream on the device; None on a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


_HERE = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes the device the current one, on which Triton launches, and whose current stream torch asks."""
    if device.type != "cuda" or torch._C._cuda_getDevice() == device.index:
        return _HERE
    return torch.cuda.device(device)


def using(stream: torch.cuda.Stream) -> contextlib.AbstractContextManager[object]:
    """Makes the stream, and its device, the current one."""
    return torch.cuda.stream(stream)


def handle(device: torch.device) -> int:
    """The current stream's handle, as launches take it and by which streams are told apart; 0 on a CPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether operations on the device are being captured into a CUDA graph instead of run."""
    if device.type != "cuda":
        return False
    with on(device):
        return torch.cuda.is_current_stream_capturing()


def is_captured(stream: torch.cuda.Stream) -> bool:
    """Whether a CUDA graph is being captured from this stream, by whatever thread."""
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


def capture_number(stream: torch.cuda.Stream) -> int | None:
    """A number for the capture that a stream is in, which no other capture of this process has; None if none tells."""
    capture_info = _capture_info()
    if capture_info is None:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    failed = capture_info(stream.cuda_stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    return None if failed or status.value != _ACTIVE else number.value


_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE


@functools.cache
def _capture_info() -> Callable[..., int] | None:
    """The driver's function, which torch has no name for; None where there is none."""
    try:
        found = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
    found.restype, found.argtypes = ctypes.c_int, [ctypes.c_void_p] * 6
    capture_info: Callable[..., int] = found
    return capture_info


def wait_for_device(device: torch.device) -> None:
    """Waits on the host for everything that any stream of the device has been given, replays of graphs included."""
    torch.cuda.synchronize(device)


class StreamOrder:
    """Orders writes to memory with the launches that read it, on all streams of a device.

    A stream that reads waits for the last write. A write waits for everything that the streams which have ever read
    were given so far. Both wait on the device, not on the host. A replay of a captured graph is in no stream known
    here: once a capture has read, what replays may read is written after `settle`, which waits on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captured = False  # whether a CUDA graph reads the memory
        self.lock = threading.RLock()
        self._streams: dict[int, torch.cuda.Stream] = {}  # all that have read or written
        self._after_write: set[int] = set()  # those that are ordered after the last write
        self._written: torch.cuda.Event | None = None

    def read(self) -> None:
        """What the current stream is given from now on may read."""
        stream = current(self.device)
        if stream is None:
            return
        if capturing(self.device):
            self.captured = True
        elif stream.cuda_stream not in self._after_write:
            with self.lock:
                self._enter(stream)

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """What the current stream is given inside writes. Not while `busy`."""
        with self.lock:
            stream = current(self.device)
            if stream is None:
                yield
                return
            self._enter(stream)
            for event in self.fence():
                stream.wait_event(event)
            try:
                yield
            finally:
                self._written = stream.record_event()
                self._after_write = {stream.cuda_stream}

    def fence(self) -> list[torch.cuda.Event]:
        """Events that are over when everything is that streams which read were given so far. Not while `busy`."""
        with self.lock:
            return [stream.record_event() for stream in self._streams.values()]

    def settle(self) -> None:
        """If a graph reads, waits on the host for all work of the device, so that no replay is under way."""
        if self.captured:
            wait_for_device(self.device)

    def finish(self) -> None:
        """Waits on the host for what the current stream was given, so that every later launch and replay sees it."""
        stream = current(self.device)
        if stream is not None:
            stream.synchronize()

    def busy(self) -> bool:
        """Whether a CUDA graph is being captured here, or from a stream that has read. It would get the write."""
        if current(self.device) is None:
            return False
        return capturing(self.device) or any(is_captured(stream) for stream in list(self._streams.values()))

    def _enter(self, stream: torch.cuda.Stream) -> None:
        if self._written is not None and stream.cuda_stream not in self._after_write:
            stream.wait_event(self._written)
        self._streams[stream.cuda_stream] = stream
        self._after_write.add(stream.cuda_stream)

    def __reduce__(self) -> tuple[type[StreamOrder], tuple[torch.device]]:
        return StreamOrder, (self.device,)  # a copy orders other memory
