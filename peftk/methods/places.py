"""Finds the places for bottleneck adapters: "attention" and "mlp" in known families, or any modules of a model."""

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
    """A block of the model: the dotted names of its owner, of the module with input x, and of the module to adapt."""

    owner: str
    source: str
    sink: str

    def below(self, name: str) -> str:
        """The name of one of these modules relative to the owner."""
        return name[len(self.owner) :].lstrip(".")


def places(model: nn.Module, where: Names, leave_out: Collection[int]) -> list[Place]:
    """The blocks and modules that a config selects, except those in the layers that it leaves out.

    Raises ValueError if nothing matches, or a layer to leave out is not there.
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
            owner = architectures.layer_of(name, known)
            number = first_number(f"{name}.") if owner is None else owner.number
            numbers |= set() if number is None else {number}
            if number is None or number not in leave_out:
                found[name] = Place(name, name, name)
    absent = sorted(set(leave_out) - numbers)
    if absent:
        raise ValueError(f"leave_out: expected numbers of the model's layers, got {absent[0]}")
    if not found:
        raise ValueError(f"leave_out: expected some layer to remain, got {list(leave_out)}, which leaves none")
    return list(found.values())


def _of_block(layer: str, block: Block) -> Place:
    def path(*names: str) -> str:
        return ".".join(name for name in (layer, block.owner, *names) if name)

    return Place(path(), path(block.source), path(block.sink))


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """The fields that series and parallel adapters share; see `SeriesAdapterConfig` and `ParallelAdapterConfig`."""

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
            fields.set_fields(self, bottleneck=fields.count("bottleneck", self.bottleneck))
        else:
            fields.set_fields(self, reduction_factor=fields.positive("reduction_factor", self.reduction_factor))
        fields.set_fields(self, where=fields.names("where", self.where))
        set_bottleneck_fields(self)

    def width(self, d: int) -> int:
        """R: the bottleneck, or d / reduction_factor rounded down, at least 1."""
        if self.bottleneck is not None:
            return self.bottleneck
        assert self.reduction_factor is not None
        return max(1, int(d / self.reduction_factor))


def set_bottleneck_fields(config: Any) -> None:
    """Checks and converts activation, scaling, leave_out and adapter_dtype of a bottleneck's config.

    Raises ValueError or TypeError for a bad field.
    """
    if config.activation not in activations.CODES:
        raise ValueError(f"activation: expected one of {', '.join(activations.CODES)}, got {config.activation!r}")
    fields.set_fields(
        config,
        scaling=fields.number("scaling", config.scaling),
        leave_out=fields.layer_numbers("leave_out", config.leave_out),
    )
    checks.adapter_shapes(1, 1, None, None, config.scaling)
    if config.adapter_dtype is not None:
        checks.adapter_dtype(config.adapter_dtype)
