"""BitFit: only biases train. Source: Ben Zaken et al. 2021."""

from __future__ import annotations

import dataclasses

from torch import nn

from peftk.methods import architectures, fields
from peftk.methods.fields import Names
from peftk.methods.plan import Plan, adapter_parameters
from peftk.methods.targets import matches
from peftk.nn.attached import Attached
from peftk.nn.bitfit import BitFitLinear
from peftk.nn.replace import is_linear, plain

ALL = "all"


@dataclasses.dataclass(frozen=True)
class BitFitConfig:
    """Trains biases in place, and nothing else. Linears whose bias trains run on peftk's kernels.

    biases: "all"; or a list of names that end the dotted names of the biases' modules (["query",
    "intermediate.dense"]); or one regular expression that matches these in full. "query", "key" and "value" also work
    in models of known families that use different names (q_proj). If one linear computes all three (GPT-2), they train
    together or not at all.

    |Φ| = the number of elements of the biases; nothing is added to the model. Raises ValueError for a bad field.

    Source: Ben Zaken et al. 2021.
    """

    biases: Names = ALL

    def __post_init__(self) -> None:
        fields.set_fields(self, biases=fields.names("biases", self.biases, keyword=ALL))

    def plan(self, model: nn.Module) -> Plan:
        """Raises ValueError if a name matches no module with a bias."""
        biases = _biases(model)
        if self.biases == ALL:
            wanted = set(biases)
        elif isinstance(self.biases, str):
            wanted = {name for name in biases if matches(self.biases, name)}
        else:
            wanted = set().union(*(self._match_name(model, name, biases) for name in self.biases))
        if not wanted:
            raise ValueError(f"biases: expected to match some module with a bias, got {self.biases!r}")
        layers = {}
        for name in biases:
            module = model.get_submodule(name)
            if name in wanted and name and is_linear(module) and plain(module):
                layers[name] = BitFitLinear.from_linear(module)
        trained = [f"{module}.{name}".lstrip(".") for module in biases if module in wanted for name in biases[module]]
        return Plan(layers=layers, trained=trained)

    def _match_name(self, model: nn.Module, name: str, biases: dict[str, list[str]]) -> set[str]:
        found = {module for module in biases if matches([name], module)}
        layers = [layer for layer in architectures.layers(model) if name in layer.family.linears]
        for layer in layers:
            linear = layer.path(layer.family.linears[name])
            together = {role for role, other in layer.family.linears.items() if layer.path(other) == linear}
            if not together <= set(self.biases):
                raise ValueError(
                    f"biases: expected {', '.join(sorted(together))} together, as one linear, {linear}, computes them, "
                    f"got {self.biases!r}"
                )
            found |= {linear} & biases.keys()
        if not found:
            raise ValueError(f"biases: expected to match some module with a bias, got {name!r}")
        return found


def _biases(model: nn.Module) -> dict[str, list[str]]:
    """The names of each module's own biases, by the module's name, without those of adapters."""
    found = {}
    for name, module in model.named_modules():
        names = [bias for bias in module._parameters if "bias" in bias and module._parameters[bias] is not None]
        names = [bias for bias in names if bias not in adapter_parameters(module)]
        if names and not isinstance(module, Attached):
            found[name] = names
    return found
