"""Mixed batches of HF PEFT (`adapter_names=`): turns adapter names per sample into ids, once per forward of the model.

PEFT passes the names to every layer, which turns them into lists of indices, adapter by adapter. Here they are turned
into ids once, in a `peftk.adapters.route.RoutedForward` that all layers share, together with what is derived from it
(the sort of the rows).

Activation checkpointing runs layers again during the backward, when PEFT has removed its hooks. Therefore the names are
stored on the checkpoints that a forward runs in, and the recomputation reads them there.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peftk.adapters import carry
from peftk.adapters.route import Route, RoutedForward

BASE = "__base__"  # PEFT's name for no adapter


class Batch:
    """The adapter names of a batch, one per sample. An adapter's number is its index in `unique`; BASE is -1."""

    def __init__(self, names: Sequence[str], *, trains: bool) -> None:
        self.names, self.trains = names, trains
        self.unique = tuple(sorted(set(names) - {BASE}))
        self._others: dict[tuple[str, ...], Batch] = {}

    def ids(self) -> Tensor:
        """The numbers, int32, one per sample."""
        numbers = {BASE: -1, **{name: number for number, name in enumerate(self.unique)}}
        return torch.tensor([numbers[name] for name in self.names], dtype=torch.int32, device="cpu")

    @functools.cached_property
    def route(self) -> RoutedForward:
        return Route(self.ids()).forward()

    def of(self, names: Sequence[str]) -> Batch:
        """This batch, or one with different names in the same forward: generate() expands beams only in the decoder."""
        if names is self.names:
            return self
        key = tuple(names)
        if key not in self._others:
            self._others[key] = Batch(names, trains=self.trains)
        return self._others[key]


_shared_batch: contextvars.ContextVar[Batch | None] = contextvars.ContextVar("peftk_adapter_names", default=None)


@contextlib.contextmanager
def share_batch(names: Sequence[str]) -> Iterator[None]:
    """Within the `with`, layers that get these names share one `Batch`."""
    token = _shared_batch.set(Batch(names, trains=torch.is_grad_enabled()))
    try:
        yield
    finally:
        _shared_batch.reset(token)


def current_batch(names: Sequence[str] | None) -> Batch | None:
    """The batch of a layer that got `names` (None: no mixed batch); in a recomputation, the batch of the forward."""
    if torch.compiler.is_compiling():
        return None if names is None else Batch(names, trains=False)
    batch = None
    if names is not None:
        shared = _shared_batch.get()
        # a layer that is called directly cannot know whether a backward may follow (torch's reentrant checkpoints run
        # it under no_grad), so it assumes that one does
        batch = Batch(names, trains=True) if shared is None else shared.of(names)
    if carry.may_be_checkpointed(trains=batch is not None and batch.trains):
        batch = carry.stored_in_checkpoints(batch, name="_peftk_adapter_names")
    return batch
