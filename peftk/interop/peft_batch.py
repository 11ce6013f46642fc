"""Which PEFT adapter serves which sample of a mixed batch (`adapter_names=`): read once a model forward.

PEFT hands the names to every layer, which turns them into lists of indices, adapter by adapter. Here they become ids
once, in one `peftk.adapters.route.Forward` that all layers share, and so is what is derived from it (the sort of the
rows).

Activation checkpointing runs layers again during the backward, when PEFT has taken its hooks away. So the names are
left with the checkpoints that a forward runs in, and the recomputation finds them there.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peftk.adapters import carry
from peftk.adapters.route import Forward, Route

BASE = "__base__"  # PEFT's name for no adapter


class Batch:
    """The names of one batch, one a sample, and the numbers that stand for them: those of `unique`, -1 for BASE."""

    def __init__(self, names: Sequence[str], *, trains: bool) -> None:
        self.names, self.trains = names, trains
        self.unique = tuple(sorted(set(names) - {BASE}))
        self._others: dict[tuple[str, ...], Batch] = {}

    def ids(self) -> Tensor:
        """int32, one a sample."""
        numbers = {BASE: -1, **{name: number for number, name in enumerate(self.unique)}}
        return torch.tensor([numbers[name] for name in self.names], dtype=torch.int32, device="cpu")

    @functools.cached_property
    def route(self) -> Forward:
        return Route(self.ids()).forward()

    def of(self, names: Sequence[str]) -> Batch:
        """This batch, or one of other names in the same forward: generate() expands beams in the decoder alone."""
        if names is self.names:
            return self
        key = tuple(names)
        if key not in self._others:
            self._others[key] = Batch(names, trains=self.trains)
        return self._others[key]


_entered: contextvars.ContextVar[Batch | None] = contextvars.ContextVar("peftk_adapter_names", default=None)


@contextlib.contextmanager
def entered(names: Sequence[str]) -> Iterator[None]:
    """Within the `with`, layers that are given these names share one `Batch`."""
    token = _entered.set(Batch(names, trains=torch.is_grad_enabled()))
    try:
        yield
    finally:
        _entered.reset(token)


def at_hand(names: Sequence[str] | None) -> Batch | None:
    """The batch of a layer that was given `names` (None: no mixed batch); in a recomputation, that of the forward."""
    if torch.compiler.is_compiling():
        return None if names is None else Batch(names, trains=False)
    batch = None
    if names is not None:
        shared = _entered.get()
        # a layer that is called by itself does not know whether a backward may follow (torch's reentrant checkpoints
        # run it under no_grad), so it takes it that one does
        batch = Batch(names, trains=True) if shared is None else shared.of(names)
    if carry.may_be_checkpointed(trains=batch is not None and batch.trains):
        batch = carry.stored_in_checkpoints(batch, name="_peftk_adapter_names")
    return batch
