"""Makes tensors for objects that outlive the call: ordinary ones, in memory that no CUDA graph takes back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

import torch

from peftk.system import streams

T = TypeVar("T")


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Tensors made inside, or by a function decorated with `@lasting()`, are ordinary tensors without gradients.

    The caller may be in torch.inference_mode(). Inference tensors cannot be trained, or changed outside of that mode.
    One kept by a layer, a bank, a table or a receipt would fail later, far from where it was made.
    """
    with torch.inference_mode(False), torch.no_grad():  # inference_mode(False) alone would record gradients
        yield


def keep_for_graphs(key: Hashable, what: object) -> None:
    """Keeps what a CUDA graph reads that is being captured, for the life of the process.

    Nothing tells when a graph is replayed last. What has the same key is replaced.
    """
    read_by_graphs[key] = what


read_by_graphs: dict[Hashable, object] = {}


def outside_pools(device: torch.device, make: Callable[[], T]) -> T:
    """make(), which makes tensors on the device that are kept. Waits until they are complete. Not in a capture.

    `torch.compile(mode="reduce-overhead")` and `max-autotune` run a graph once before they capture it, and put all that
    the thread allocates into the graph's pool. What is still there afterwards is an error, or overwritten by replays.
    A thread of its own allocates elsewhere.
    """
    stream = streams.current(device)
    if stream is None:
        with lasting():
            return make()
    made: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with lasting(), streams.using(stream):
                made.append(make())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    stream.synchronize()
    if failed:
        raise failed[0]
    return made[0]
