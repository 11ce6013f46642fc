"""Methods that add nothing: the head alone, the topmost layers, or all of the model trains.

Sources: Peters et al. 2019 (feature extraction or fine-tuning); Howard & Ruder 2018 (layers from the top down).
"""

from __future__ import annotations

import dataclasses

from torch import nn

from peftk.methods import architectures, fields
from peftk.methods.fields import Names
from peftk.methods.plan import Plan, of_adapter


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Feature-based transfer: the model is frozen but its head, on top of the features that it computes.

    modules: names that end the head's dotted name, or a regular expression; None for what the model has beside its
    base model (transformers), or calls classifier, score, lm_head, … at its top.
    """

    modules: Names | None = None

    def __post_init__(self) -> None:
        if self.modules is not None:
            fields.settle(self, modules=fields.names("modules", self.modules))

    def plan(self, model: nn.Module) -> Plan:
        """Raises ValueError where the model has no head, or one that shares a parameter with the rest."""
        found = architectures.head_parameters(model, self.modules)
        if not found:
            raise ValueError(f"modules: expected the names of a head, as {type(model).__name__} has none that is known")
        return Plan(trained=found)


@dataclasses.dataclass(frozen=True)
class TopLayersConfig:
    """The k topmost layers (of encoder and decoder each) train, and the head where the model has one and head is True.

    layers: for a model of no known family, the name of its list of layers (nn.ModuleList).
    """

    k: int
    head: bool = True
    layers: str | None = None

    def __post_init__(self) -> None:
        fields.settle(self, k=fields.count("k", self.k))

    def plan(self, model: nn.Module) -> Plan:
        """Raises ValueError where the model's layers aren't known or fewer than k, or its head shares a parameter."""
        layers = self._layers(model)
        trained = [n for n, _ in model.named_parameters() if any(n.startswith(f"{layer}.") for layer in layers)]
        if self.head:
            trained += architectures.head_parameters(model, None, "head")
        return Plan(trained=[name for name in trained if not of_adapter(model, name)])

    def _layers(self, model: nn.Module) -> list[str]:
        if self.layers is None:
            known = architectures.known_layers(model, "layers")
            return [layer.name for layer in architectures.topmost(known, self.k, "k")]
        stack = dict(model.named_modules()).get(self.layers)
        if not isinstance(stack, (nn.ModuleList, nn.Sequential)):
            raise ValueError(f"layers: expected the name of an nn.ModuleList, got {self.layers!r}")
        if self.k > len(stack):
            raise ValueError(f"k: expected at most the {len(stack)} layers of {self.layers}, got {self.k}")
        return [f"{self.layers}.{number}" for number in range(len(stack) - self.k, len(stack))]


@dataclasses.dataclass(frozen=True)
class FullConfig:
    """Full fine-tuning: every parameter trains. What the others are compared with."""

    def plan(self, model: nn.Module) -> Plan:
        return Plan(trained=[name for name, _ in model.named_parameters() if not of_adapter(model, name)])
