"""The workspace of a launch: counters in device memory that are zero between launches.

A workspace belongs to one device and stream, or to one stream of one capture of a CUDA graph, so two launches in flight
do not share counters. Kernels reset their counters to zero. So nothing is cleared between launches, and a captured
graph can replay, without nodes that clear memory.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from peftk.system import streams
from peftk.system.lasting import lasting, outside_pools

_SLAB = 1 << 18  # counters reserved for launches captured in CUDA graphs: 1 MiB per device
_LEAST = 1024  # counters of a stream, or of a stream of a capture; more if a launch needs more

_lock = threading.RLock()
_launching: dict[tuple[torch.device, int], threading.RLock] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_of_capture: dict[tuple[torch.device, int, int], Tensor] = {}  # by capture and stream
_slabs: dict[torch.device, Tensor] = {}  # what is left for captures
_taken: list[Tensor] = []  # what captures got, kept for the life of the process, as nobody knows when a graph ends


class counters:
    """int32 [≥ count], all zero, for one launch on the current stream, which leaves them at zero.

    A launch that fails may leave any values, so the next launch gets new counters. The launches that a CUDA graph
    captures from one stream run one after the other, so they share counters, which no other graph has; they are from a
    slab that calls outside of captures make. Raises RuntimeError if that is used up.

    Inside, no other thread launches anything with counters on this stream: two launches that may overlap follow each
    other directly.

        with counters(device, count) as tensor:
    """

    __slots__ = ("_count", "_device", "_launching")

    def __init__(self, device: torch.device, count: int) -> None:
        self._device, self._count = device, count
        self._launching = launching(device, streams.handle(device))

    def __enter__(self) -> Tensor:
        self._launching.acquire()
        try:
            return _counters(self._device, self._count)
        except BaseException:
            self._launching.release()
            forget(self._device)
            raise

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._launching.release()
        if kind is not None:
            forget(self._device)


def launching(device: torch.device, stream: int) -> threading.RLock:
    """Held by the thread that launches with the counters of a stream, which has this handle."""
    return _launching.get((device, stream)) or _launching.setdefault((device, stream), threading.RLock())


def of_stream(device: torch.device, stream: int) -> Tensor | None:
    """The counters of a stream, by its handle, if launches outside of captures have made any."""
    return _of_stream.get((device, stream))


def forget(device: torch.device) -> None:
    """Drops the device's counters, so that its next launch gets new ones."""
    with _lock:
        for key in [key for key in _of_stream if key[0] == device]:
            del _of_stream[key]
        for captured in [captured for captured in _of_capture if captured[0] == device]:
            del _of_capture[captured]


def all_counters() -> Iterator[Tensor]:
    """Everything that must be zero while no launch is running."""
    with _lock:
        yield from itertools.chain(_of_stream.values(), _slabs.values(), _taken)


def _counters(device: torch.device, count: int) -> Tensor:
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device=device)
    found, slab = _of_stream.get((device, streams.handle(device))), _slabs.get(device)
    reserved = slab is None or slab.numel() >= _SLAB // 2
    if found is not None and found.numel() >= count and reserved and not streams.capturing(device):
        return found
    with _lock, lasting():
        stream = streams.current(device)
        if stream is None:
            return _stream_counters(device, 0, count)
        if streams.capturing(device):
            return _captured_counters(device, stream, count)
        if device not in _slabs or _slabs[device].numel() < _SLAB // 2:
            _slabs[device] = _zeros(device, _SLAB)  # complete, as a replay may come in any stream
        return _stream_counters(device, stream.cuda_stream, count)


def _stream_counters(device: torch.device, stream: int, count: int) -> Tensor:
    buffer = _of_stream.get((device, stream))
    if buffer is None or buffer.numel() < count:
        buffer = _of_stream[device, stream] = _zeros(device, max(count, _LEAST))
    return buffer


def _zeros(device: torch.device, count: int) -> Tensor:
    return outside_pools(device, lambda: torch.zeros(count, dtype=torch.int32, device=device))


def _captured_counters(device: torch.device, stream: torch.cuda.Stream, count: int) -> Tensor:
    capture = streams.capture_number(stream)
    if capture is None:  # nobody tells captures apart: every launch has counters of its own
        return _take(device, count)
    key = (device, capture, stream.cuda_stream)
    shared = _of_capture.get(key)
    if shared is None or shared.numel() < count:
        shared = _of_capture[key] = _take(device, max(count, _LEAST))
    return shared


def _take(device: torch.device, count: int) -> Tensor:
    count = -(-count // 32) * 32  # whole lines of 128 bytes
    slab = _slabs.get(device)
    if slab is None or slab.numel() < count:
        left = 0 if slab is None else slab.numel()
        raise RuntimeError(
            f"counters: expected {count} that were reserved before the capture of a CUDA graph, got {left}; "
            "run the model once outside of a capture"
        )
    _slabs[device] = slab[count:]
    _taken.append(slab[:count])
    return slab[:count]


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors of the GPU; 4 if a CPU stands in for it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
