"""Where bottleneck adapters go: "attention" and "mlp" of known families, or any modules of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftk import activations, checks
from peftk.methods import architectures
from peftk.methods.architectures import ROLES, Block
from peftk.methods.targets import Names, check_layers, check_names, layer_number, target_modules


@dataclasses.dataclass(frozen=True)
class Place:
    """A block of the model: dotted names of its owner, of what gets x, and of what returns what is adapted."""

    owner: str
    source: str
    sink: str

    def below(self, name: str) -> str:
        """The name of one of its parts below the owner."""
        return name[len(self.owner) :].lstrip(".")


def places(model: nn.Module, where: Names, leave_out: Sequence[int]) -> list[Place]:
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
            number = layer_number(f"{name}.") if within is None else within.number
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
    leave_out: Sequence[int] = ()
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if (self.bottleneck is None) == (self.reduction_factor is None):
            raise ValueError(
                "bottleneck: expected exactly one of bottleneck and reduction_factor, "
                f"got {self.bottleneck!r} and {self.reduction_factor!r}"
            )
        R, factor = self.bottleneck, self.reduction_factor
        if R is not None and (not isinstance(R, int) or isinstance(R, bool) or R < 1):
            raise ValueError(f"bottleneck: expected an integer of 1 or more, got {R!r}")
        if factor is not None and (not isinstance(factor, (int, float)) or isinstance(factor, bool) or not factor > 0):
            raise ValueError(f"reduction_factor: expected a number above 0, got {factor!r}")
        check_names("where", self.where)
        check_bottleneck(self)

    def width(self, d: int) -> int:
        """R: the bottleneck, or d / reduction_factor, 1 at least."""
        if self.bottleneck is not None:
            return self.bottleneck
        assert self.reduction_factor is not None
        return max(1, int(d / self.reduction_factor))


def check_bottleneck(config: Any) -> None:
    """Raises ValueError or TypeError for activation, scaling, leave_out or adapter_dtype of a bottleneck's config."""
    if config.activation not in activations.CODES:
        raise ValueError(f"activation: expected one of {', '.join(activations.CODES)}, got {config.activation!r}")
    checks.adapter_shapes(1, 1, None, None, config.scaling)
    check_layers("leave_out", config.leave_out)
    if config.adapter_dtype is not None:
        checks.adapter_dtype(config.adapter_dtype)
