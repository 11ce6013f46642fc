"""Which adapter serves which sequence of the batch at hand: the state behind `MultiAdapter.route`.

A context variable holds it, so threads and asyncio tasks that serve different batches do not see each other's.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor


class Route:
    """The ids of one batch, per sequence [B] or per token [B, T], expanded once per shape that layers ask for."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._expanded: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def rows(self, x: Tensor) -> Tensor:
        """int32 ids of shape x.shape[:-1].

        A batch that is a multiple of ours (generate() expands beams, models flatten [B, T] to [B·T]) repeats each id.
        """
        key = (x.shape[:-1], x.device)
        found = self._expanded.get(key)
        if found is None:
            found = self._expanded[key] = self._expand(x).to(x.device, torch.int32)
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


def current() -> Route | None:
    """The route of the enclosing `with`, or None outside of one."""
    return _current.get()


@contextlib.contextmanager
def routed(ids: Tensor) -> Iterator[Route]:
    route = Route(ids)
    token = _current.set(route)
    try:
        yield route
    finally:
        _current.reset(token)
