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
from collections.abc import Iterator

import torch
import torch.utils.checkpoint
from torch import Tensor


class Route:
    """The ids of one batch, per sequence [B] or per token [B, T], expanded once per shape that layers ask for."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._expanded: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def rows(self, x: Tensor) -> Tensor:
        """ids of shape x.shape[:-1].

        A batch that is a multiple of ours (generate() expands beams, models flatten [B, T] to [B·T]) repeats each id.
        """
        key = (x.shape[:-1], x.device)
        found = self._expanded.get(key)
        if found is None:
            found = self._expanded[key] = self._expand(x).to(x.device)
        return found

    def _expand(self, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        if self.ids.shape == shape:
            return self.ids
        ids = self.ids
        if ids.dim() == 2 and len(shape) == 1:
            ids = ids.reshape(-1)
        if shape[:1] == torch.Size() or ids.shape[0] == 0 or shape[0] % ids.shape[0]:
            raise ValueError(
                f"route: expected x with a batch that is a multiple of the {self.ids.shape[0]} routed sequences, "
                f"got x of shape {list(x.shape)}"
            )
        ids = ids.repeat_interleave(shape[0] // ids.shape[0], dim=0)
        if ids.dim() > 1 and ids.shape != shape:
            raise ValueError(
                f"route: expected x of shape {list(self.ids.shape)} + [K] (per token), got {list(x.shape)}"
            )
        return ids.reshape(-1, *[1] * (len(shape) - ids.dim())).expand(shape) if ids.dim() == 1 else ids


_current: contextvars.ContextVar[Route | None] = contextvars.ContextVar("peftk_route", default=None)
_LEFT = "_peftk_route"


def current(*, trains: bool) -> Route | None:
    """The route of the enclosing `with`, or None outside of one; within a recomputation, that of the forward.

    trains: whether a backward may follow, so that checkpoints on the way must remember the route.
    """
    if torch.compiler.is_compiling():
        return _current.get()
    route = _current.get()
    recomputes = torch._C._current_graph_task_id() != -1
    if not (trains or recomputes):
        return route
    checkpoints = list(_checkpoints())
    if recomputes:
        route = next((getattr(c, _LEFT) for c in checkpoints if hasattr(c, _LEFT)), route)
    for checkpoint in checkpoints:
        setattr(checkpoint, _LEFT, route)
    return route


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
