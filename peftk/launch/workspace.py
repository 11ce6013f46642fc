"""The workspace of a launch: counters in device memory that are zero between launches.

A workspace belongs to one device and stream, or to one node of a CUDA graph, so two launches in flight do not share
counters. Kernels reset their counters to zero. So nothing is cleared between launches, and a captured graph can replay.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from peftk.system.lasting import lasting

_SLAB = 1 << 18  # counters reserved for launches captured in CUDA graphs: 1 MiB per device

_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_slabs: dict[torch.device, Tensor] = {}


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes the device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def counters(device: torch.device, count: int) -> Iterator[Tensor]:
    """int32 [≥ count], all zero, for one launch on the current stream, which leaves them at zero.

    A launch that fails may leave any values, so the next launch gets new counters. While a CUDA graph is captured, each
    launch gets counters of its own: from a slab that was zeroed before the capture, or, once that is used up, from
    memory that a node of the graph zeroes.
    """
    try:
        yield _counters(device, count)
    except BaseException:
        forget(device)
        raise


def forget(device: torch.device) -> None:
    """Drops the device's counters, so that its next launch gets new ones."""
    for key in [key for key in _of_stream if key[0] == device]:
        del _of_stream[key]


@lasting()
def _counters(device: torch.device, count: int) -> Tensor:
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device=device)
    stream = 0
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        if torch.cuda.is_current_stream_capturing():
            return _captured_counters(device, count)
        if device not in _slabs:
            _slabs[device] = torch.zeros(_SLAB, dtype=torch.int32, device=device)
    buffer = _of_stream.get((device, stream))
    if buffer is None or buffer.numel() < count:
        buffer = _of_stream[device, stream] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return buffer


def _captured_counters(device: torch.device, count: int) -> Tensor:
    count = -(-count // 32) * 32  # whole lines of 128 bytes
    slab = _slabs.get(device)
    if slab is None or slab.numel() < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _slabs[device] = slab[count:]
    return slab[:count]


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors of the GPU; 4 if a CPU stands in for it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
