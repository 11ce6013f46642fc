"""Which adapter serves which sequence of the batch at hand: the state behind `MultiAdapter.route`.

A context variable holds it, so threads and asyncio tasks that serve different batches do not see each other's. (A
thread that is started inside of a route begins without one, as with every context variable.)

Activation checkpointing runs layers again during the backward, when the `with` may have ended or another batch may be
routed. So a forward leaves its route with the checkpoints that it runs in, and the recomputation finds it there.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor

T = TypeVar("T")


class Route:
    """The ids of one batch, per sequence [B] or per token [B, T], and all that layers derive from them, made once.

    `given` is copied when the `with` begins. Nobody else has the copy, so it never changes, and what is derived from it
    (`once`) serves every layer and the backward. That is no more than an activation: it belongs to the stream that
    made it, or to the CUDA graph.

    CUDA graphs read `given` at every replay, so it must outlive them, like each input of a graph, and may be changed in
    place between replays. A route that is entered *inside* of a capture copies and derives once a replay, for all
    layers. For a route that was entered before, each captured layer reads `given` and derives by itself, since nothing
    made outside of a capture may be used within it or the reverse: its copy is old by the time of a replay, and its
    memory somebody else's.
    """

    def __init__(self, given: Tensor) -> None:
        self.given = given
        self._capturing = _capturing(given.device)
        with torch.inference_mode(False):  # a forward that is trained may follow, and saves them
            self._ids = given.clone()
        self._rows: dict[tuple[torch.Size, torch.device, int], Tensor] = {}

    def rows(self, x: Tensor) -> Tensor:
        """ids of shape x.shape[:-1].

        A batch that is a multiple of ours (generate() expands beams, models flatten [B, T] to [B·T]) repeats each id.
        """
        if torch.compiler.is_compiling():
            return self._expand(self._ids, x).to(x.device)
        if _capturing(x.device) != self._capturing:
            _read_by_graphs[id(self.given)] = self.given
            return self._expand(self.given, x).to(x.device)
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        key = (x.shape[:-1], x.device, stream)
        found = self._rows.get(key)
        if found is None:
            with torch.inference_mode(False):
                flat = flatten(self._expand(self._ids, x).to(x.device))
            setattr(flat, _DERIVED, (self._capturing, {}))
            found = self._rows[key] = flat.view(x.shape[:-1])
            setattr(found, _FLAT, flat)
        return found

    def _expand(self, ids: Tensor, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        if ids.shape == shape:
            return ids
        if ids.dim() == 2 and len(shape) == 1:
            ids = ids.reshape(-1)
        if shape[:1] == torch.Size() or ids.shape[0] == 0 or shape[0] % ids.shape[0]:
            raise ValueError(
                f"route: expected x with a batch that is a multiple of the {self.given.shape[0]} routed sequences, "
                f"got x of shape {list(x.shape)}"
            )
        ids = ids.repeat_interleave(shape[0] // ids.shape[0], dim=0)
        if ids.dim() > 1 and ids.shape != shape:
            raise ValueError(
                f"route: expected x of shape {list(self.given.shape)} + [K] (per token), got {list(x.shape)}"
            )
        return ids.reshape(-1, *[1] * (len(shape) - ids.dim())).expand(shape) if ids.dim() == 1 else ids


# Kept for good: ids made of names have no other owner, and a graph that reads them does not say when it ends.
_read_by_graphs: dict[int, Tensor] = {}

# A tensor that a route made carries what was made of it.
_FLAT = "_peftk_flat"
_DERIVED = "_peftk_derived"


def flat(ids: Tensor) -> Tensor | None:
    """int32 [M] for the ids that `Route.rows` gave out, the same tensor for every layer; None for any other ids."""
    return getattr(ids, _FLAT, None)


def flatten(ids: Tensor) -> Tensor:
    """int32 [M]. What int32 cannot hold stays outside of every bank."""
    if ids.dtype == torch.int64:
        ids = ids.clamp(-2, 2**31 - 1)
    return ids.reshape(-1).to(torch.int32)


def once(ids: Tensor, key: Hashable, derive: Callable[[], T]) -> T:
    """derive(), kept with ids that came from `flat`, which never change. Any others may: they are derived from anew."""
    kept: tuple[bool, dict[Hashable, T]] | None = getattr(ids, _DERIVED, None)
    if kept is None or kept[0] != _capturing(ids.device):
        return derive()
    derived = kept[1]
    if key not in derived:
        derived[key] = derive()
    return derived[key]


def _capturing(device: torch.device) -> bool:
    """Whether what happens now on the device is recorded into a CUDA graph, and doesn't happen yet."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_current: contextvars.ContextVar[Route | None] = contextvars.ContextVar("peftk_route", default=None)
_LEFT = "_peftk_route"


def current(*, trains: bool) -> Route | None:
    """The route of the enclosing `with`, or None outside of one; within a recomputation, that of the forward.

    trains: whether a backward may follow, so that checkpoints on the way must remember the route.
    """
    return remembered(_current.get(), trains=trains, name=_LEFT)


def remembered(value: T | None, *, trains: bool, name: str) -> T | None:
    """`value`, left under `name` with the checkpoints on the way; within a recomputation, what the forward left there.

    trains: as in `current`.
    """
    if torch.compiler.is_compiling():
        return value
    recomputes = torch._C._current_graph_task_id() != -1
    if not (trains or recomputes):
        return value
    checkpoints = list(_checkpoints())
    if recomputes:
        value = next((getattr(c, name) for c in checkpoints if hasattr(c, name)), value)
    for checkpoint in checkpoints:
        setattr(checkpoint, name, value)
    return value


def _checkpoints() -> Iterator[object]:
    """The checkpoints that the caller runs in, innermost first: objects that torch keeps from forward to backward.

    torch offers no way to hang state of one's own on a checkpoint, so they are looked up on the stack.
    """
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        code = frame.f_code
        if code.co_filename != torch.utils.checkpoint.__file__:
            continue
        if code.co_name in ("forward", "backward"):  # of CheckpointFunction, use_reentrant=True
            yield frame.f_locals["ctx"]
        elif code.co_name == "unpack_hook" and "frame" in frame.f_locals:  # use_reentrant=False, recomputing
            yield frame.f_locals["frame"]
        elif code.co_name == "checkpoint" and "gen" in frame.f_locals:  # use_reentrant=False, running forward
            yield frame.f_locals["gen"].gi_frame.f_locals["new_frame"]


@contextlib.contextmanager
def routed(ids: Tensor) -> Iterator[None]:
    token = _current.set(Route(ids))
    try:
        yield
    finally:
        _current.reset(token)
