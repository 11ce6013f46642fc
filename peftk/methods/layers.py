"""Methods that add no parameters: only the head, the topmost layers, or the whole model trains.

Sources: Peters et al. 2019 (feature extraction or fine-tuning); Howard & Ruder 2018 (layers from the top down).
"""

from __future__ import annotations

import dataclasses

from torch import nn

from peftk.methods import architectures, fields
from peftk.methods.fields import Names
from peftk.methods.plan import Plan, is_adapter_parameter


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Feature-based transfer: only the model's head trains, on top of frozen features.

    modules: names that end the head's dotted name, or a regular expression. None means everything that a transformers
    model has beside its base model, or a top-level module called classifier, score, lm_head, ….

    |Φ| = the head's parameters; nothing is added to the model. Raises ValueError for a bad field.

    Source: Peters et al. 2019.
    """

    modules: Names | None = None

    def __post_init__(self) -> None:
        if self.modules is not None:
            fields.set_fields(self, modules=fields.names("modules", self.modules))

    def plan(self, model: nn.Module) -> Plan:
        """Raises ValueError if the model has no head, or one that shares a parameter with the rest."""
        found = architectures.head_parameters(model, self.modules)
        if not found:
            raise ValueError(f"modules: expected names, as no head is known in {type(model).__name__}, got None")
        return Plan(trained=found)


@dataclasses.dataclass(frozen=True)
class TopLayersConfig:
    """The k topmost layers train (in an encoder-decoder, k of each), and the head, if there is one and `head` is True.

    layers: for a model of no known family, the name of its list of layers (nn.ModuleList).

    |Φ| = the parameters of these modules; nothing is added to the model. Raises ValueError for a bad field.

    Source: Howard & Ruder 2018.
    """

    k: int
    head: bool = True
    layers: str | None = None

    def __post_init__(self) -> None:
        fields.set_fields(self, k=fields.count("k", self.k))

    def plan(self, model: nn.Module) -> Plan:
        """Raises ValueError if the model's layers are unknown or fewer than k, or its head shares a parameter."""
        layers = self._layers(model)
        trained = [n for n, _ in model.named_parameters() if any(n.startswith(f"{layer}.") for layer in layers)]
        if self.head:
            trained += architectures.head_parameters(model, None, "head")
        return Plan(trained=[name for name in trained if not is_adapter_parameter(model, name)])

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
    """Full fine-tuning: every parameter of the model trains. A baseline to compare the other methods with."""

    def plan(self, model: nn.Module) -> Plan:
        return Plan(trained=[name for name, _ in model.named_parameters() if not is_adapter_parameter(model, name)])
