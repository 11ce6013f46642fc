"""Where bottleneck adapters go: "attention" and "mlp" of known families, or any modules of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from peftk.adapters import activations, checks
from peftk.methods import architectures, fields
from peftk.methods.architectures import ROLES, Block
from peftk.methods.fields import Names
from peftk.methods.targets import first_number, target_modules


@dataclasses.dataclass(frozen=True)
class Place:
    """A block of the model: dotted names of its owner, of what gets x, and of what returns what is adapted."""

    owner: str
    source: str
    sink: str

    def below(self, name: str) -> str:
        """The name of one of its parts below the owner."""
        return name[len(self.owner) :].lstrip(".")


def places(model: nn.Module, where: Names, leave_out: Collection[int]) -> list[Place]:
    """The blocks and modules that a config means, but those in the layers that it leaves out.

    Raises ValueError where something matches nothing, or a layer to leave out isn't there.
    """
    known = architectures.layers(model)
    numbers = {layer.number for layer in known}
    found: dict[str, Place] = {}
    names = [where] if isinstance(where, str) else list(where)
    for role in [name for name in names if name in ROLES]:
        for layer in architectures.known_layers(model, "where"):
            if layer.number not in leave_out:
                place = _of_block(layer.path(), layer.family.blocks[role])
                found[place.sink] = place
    rest: Any = [name for name in names if name not in ROLES]
    if rest:
        for name in target_modules(model, "where", where if isinstance(where, str) else rest):
            within = architectures.layer_of(name, known)
            number = first_number(f"{name}.") if within is None else within.number
            numbers |= set() if number is None else {number}
            if number is None or number not in leave_out:
                found[name] = Place(name, name, name)
    absent = sorted(set(leave_out) - numbers)
    if absent:
        raise ValueError(f"leave_out: expected numbers of the model's layers, got {absent[0]}")
    if not found:
        raise ValueError(f"leave_out: expected to leave some of the layers, got {list(leave_out)}")
    return list(found.values())


def _of_block(layer: str, block: Block) -> Place:
    def path(*names: str) -> str:
        return ".".join(name for name in (layer, block.owner, *names) if name)

    return Place(path(), path(block.source), path(block.sink))


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """What series and parallel adapters have in common: see there."""

    bottleneck: int | None = None
    reduction_factor: float | None = None
    where: Names = ()
    activation: str = "relu"
    scaling: float = 1.0
    leave_out: Collection[int] = ()
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if (self.bottleneck is None) == (self.reduction_factor is None):
            raise ValueError(
                "bottleneck: expected exactly one of bottleneck and reduction_factor, "
                f"got {self.bottleneck!r} and {self.reduction_factor!r}"
            )
        if self.bottleneck is not None:
            fields.settle(self, bottleneck=fields.count("bottleneck", self.bottleneck))
        else:
            fields.settle(self, reduction_factor=fields.above_zero("reduction_factor", self.reduction_factor))
        fields.settle(self, where=fields.names("where", self.where))
        settle_bottleneck(self)

    def width(self, d: int) -> int:
        """R: the bottleneck, or d / reduction_factor, 1 at least."""
        if self.bottleneck is not None:
            return self.bottleneck
        assert self.reduction_factor is not None
        return max(1, int(d / self.reduction_factor))


def settle_bottleneck(config: Any) -> None:
    """Checks and settles activation, scaling, leave_out and adapter_dtype of a bottleneck's config.

    Raises ValueError or TypeError.
    """
    if config.activation not in activations.CODES:
        raise ValueError(f"activation: expected one of {', '.join(activations.CODES)}, got {config.activation!r}")
    fields.settle(
        config,
        scaling=fields.number("scaling", config.scaling),
        leave_out=fields.layer_numbers("leave_out", config.leave_out),
    )
    checks.adapter_shapes(1, 1, None, None, config.scaling)
    if config.adapter_dtype is not None:
        checks.adapter_dtype(config.adapter_dtype)
