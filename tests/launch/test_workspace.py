"""Counters of launches: which launches share them, in streams, captures and threads."""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib
import re
import threading
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftk.launch import workspace
from peftk.system import streams
from tests.support.fake_streams import Device, Stream

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def counters(count: int) -> torch.Tensor:
    with workspace.counters(CPU, count) as found:
        assert found.numel() >= count
        assert not found.any()
        return found


def apart(*buffers: torch.Tensor) -> bool:
    """Whether no two lie in the same line of 128 bytes, from the beginning of the first."""
    first = min(buffer.data_ptr() for buffer in buffers)
    lines = [
        line
        for buffer in buffers
        for line in range((buffer.data_ptr() - first) // 128, (buffer[-1:].data_ptr() - first) // 128 + 1)
    ]
    return len(lines) == len(set(lines))


def test_a_stream_has_counters_of_its_own(gpu: Device) -> None:
    here = counters(10)
    assert counters(900) is here
    with gpu.on(Stream()):
        there = counters(10)
    assert there is not here
    assert apart(here, there)
    assert counters(5000).numel() == 5000


class Fills(TorchDispatchMode):
    """Counts operations that would be nodes of a graph."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func not in (torch.ops.aten.slice.Tensor, torch.ops.aten.detach.default)
        return func(*args, **(kwargs or {}))


def test_launches_of_a_capture_share_counters_by_stream(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    counters(1)  # makes the slab
    capture = 1
    monkeypatch.setattr(streams, "capture_number", lambda stream: capture)
    with gpu.capture(), Fills() as fills:
        first = workspace._counters(CPU, 40)
        assert workspace._counters(CPU, 1000) is first
        with gpu.on(Stream()) as fork:
            fork.captured = True
            forked = workspace._counters(CPU, 40)
        larger = workspace._counters(CPU, 2000)
        assert workspace._counters(CPU, 40) is larger
    capture = 2
    with gpu.on(Stream()) as again, fills:
        again.captured = True
        other = workspace._counters(CPU, 40)
        workspace.forget(CPU)  # after a launch that failed
        new = workspace._counters(CPU, 40)
    assert fills.count == 0
    assert apart(first, forked, larger, other, new)
    assert {buffer.data_ptr() for buffer in (first, forked, larger, other, new)} == {
        buffer.data_ptr() for buffer in workspace._taken
    }


def test_where_nothing_tells_captures_apart_launches_share_nothing(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters(1)
    monkeypatch.setattr(streams, "capture_number", lambda stream: None)
    with gpu.capture():
        taken = [counters(count) for count in (1, 33, 32, 40, 90, 1)]
    assert [buffer.numel() for buffer in taken] == [32, 64, 32, 64, 96, 32]
    assert apart(*taken)


def test_what_was_not_reserved_raises_in_a_capture(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "capture_number", lambda stream: 7)
    with gpu.capture(), pytest.raises(RuntimeError, match=r"expected 1024 that were reserved before .* got 0; run the"):
        counters(1)
    counters(1)
    with gpu.capture():
        counters(workspace._SLAB - 32)
        with pytest.raises(RuntimeError, match="got 32; run the model once outside of a capture"):
            counters(workspace._SLAB)
    counters(1)
    assert workspace._slabs[CPU].numel() == workspace._SLAB
    assert gpu.stream.done == gpu.stream.given


def test_threads_of_captures_share_nothing(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    counters(1)
    monkeypatch.setattr(streams, "capture_number", lambda stream: None)
    taken: list[torch.Tensor] = []

    def launch() -> None:
        taken.extend(workspace._counters(CPU, 32) for _ in range(50))

    with gpu.capture():
        threads = [threading.Thread(target=launch) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({buffer.data_ptr() for buffer in taken}) == 400


def test_the_number_of_a_capture_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    answers = iter([(0, 1, 2**40 + 5), (0, 0, 0), (900, 1, 3)])  # capturing, not capturing, an error

    @ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 6)
    def capture_info(handle: int, status: int, number: int, *rest: int | None) -> int:
        assert handle == stream.cuda_stream
        assert rest == (None, None, None)
        failed, ctypes.c_int.from_address(status).value, ctypes.c_uint64.from_address(number).value = next(answers)
        return failed

    monkeypatch.setattr(streams, "_capture_info", lambda: capture_info)
    assert [streams.capture_number(stream) for _ in range(3)] == [2**40 + 5, None, None]
    monkeypatch.setattr(streams, "_capture_info", lambda: None)
    assert streams.capture_number(stream) is None


def test_the_drivers_function_has_the_arguments_that_we_pass() -> None:
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        pytest.skip("Triton brings the header")
    header = (pathlib.Path(found.origin).parent / "backends/nvidia/include/cuda.h").read_text()
    found_v2 = re.search(r"cuStreamGetCaptureInfo_v2\((CUstream .*?)\);", header, re.DOTALL)
    assert found_v2 is not None
    arguments = re.sub(r"\s+", " ", found_v2[1]).split(", ")
    assert [re.sub(r"\w+$", "", argument).strip() for argument in arguments] == [
        "CUstream",
        "CUstreamCaptureStatus *",
        "cuuint64_t *",
        "CUgraph *",
        "const CUgraphNode **",
        "size_t *",
    ]
    assert re.search(r"CU_STREAM_CAPTURE_STATUS_ACTIVE *= 1,", header)


def test_launches_of_a_call_follow_each_other(gpu: Device) -> None:
    """Another thread launches on the stream before or after all of them; on another stream at any time."""
    order: list[str] = []
    inside, others = gpu.stream, Stream()

    def launch(name: str, stream: Stream) -> threading.Thread:
        def run() -> None:
            with workspace.launching(CPU, stream.cuda_stream):
                order.append(name)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    with workspace.counters(CPU, 4):
        waiting = launch("same stream", inside)
        launch("another stream", others).join(timeout=10)
        waiting.join(timeout=0.05)
        order.append("end")
    waiting.join(timeout=10)
    assert order == ["another stream", "end", "same stream"]


def test_a_launch_that_fails_lets_others_launch(gpu: Device) -> None:
    with pytest.raises(ZeroDivisionError), workspace.counters(CPU, 4) as used:
        raise ZeroDivisionError
    assert counters(4) is not used
    assert workspace.launching(CPU, gpu.stream.cuda_stream).acquire(blocking=False)
    thread_got: list[bool] = []
    workspace.launching(CPU, gpu.stream.cuda_stream).release()
    thread = threading.Thread(
        target=lambda: thread_got.append(workspace.launching(CPU, gpu.stream.cuda_stream).acquire(timeout=5))
    )
    thread.start()
    thread.join()
    assert thread_got == [True]


def test_a_capture_is_looked_for_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch answers for the current device alone."""
    current = [0]

    class Switch:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "device", Switch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    assert [streams.capturing(torch.device("cuda", index)) for index in (0, 1, 2)] == [False, True, False]
    assert current == [0]
    assert not streams.capturing(CPU)
