"""Parallel adapters: y = f(x) + s·act(x Aᵀ + a)Bᵀ + β beside a block or a linear. Source: He et al. 2021."""

from __future__ import annotations

import dataclasses

from torch import nn

from peftk.methods import architectures
from peftk.methods.architectures import MLP
from peftk.methods.fields import Names
from peftk.methods.places import BottleneckConfig, Place, places
from peftk.methods.plan import Plan
from peftk.methods.targets import check_called
from peftk.nn.attached import check_attachable
from peftk.nn.parallel_adapter import ParallelAdapter, ParallelAdapterLinear
from peftk.nn.parameters import default_adapter_dtype
from peftk.nn.replace import is_linear


@dataclasses.dataclass(frozen=True)
class ParallelAdapterConfig(BottleneckConfig):
    """A bottleneck adapter beside blocks or linears of a model.

    where: "mlp" (the default, which the paper found best) and "attention"; or names that end the dotted names of any
    modules; or one regular expression that matches these in full. A linear is replaced by one fused operation. A block
    stays, and the adapter's output is added to its own. scaling: s, no unit; 4 in the paper. The other fields are as in
    `SeriesAdapterConfig`.

    |Φ| = R·(K + N) + R + N per place, with K and N the widths of the block's input and output. Raises ValueError or
    TypeError for a bad field.

    Source: He et al. 2021.
    """

    where: Names = (MLP,)
    scaling: float = 4.0

    def plan(self, model: nn.Module) -> Plan:
        """Raises ValueError or TypeError if nothing matches, or a match cannot get an adapter."""
        layers, attached = {}, []
        for place in places(model, self.where, self.leave_out):
            module = model.get_submodule(place.sink)
            for part in (place.source, place.sink):
                check_called(model, "where", part)
            if is_linear(module) and place.source == place.sink:
                layers[place.sink] = ParallelAdapterLinear.from_linear(
                    module,
                    bottleneck=self.width(architectures.width_in(model, place.source)),
                    activation=self.activation,
                    scaling=self.scaling,
                    adapter_dtype=self.adapter_dtype,
                )
            else:
                attached.append((place.owner, self._adapter(model, place)))
        return Plan(layers=layers, attached=attached)

    def _adapter(self, model: nn.Module, place: Place) -> ParallelAdapter:
        check_attachable(model.get_submodule(place.owner), ParallelAdapter.name)
        K = architectures.width_in(model, place.source)
        N, weight = architectures.width_out(model, place.sink)
        return ParallelAdapter(
            K,
            self.width(K),
            N,
            activation=self.activation,
            scaling=self.scaling,
            dtype=default_adapter_dtype(weight, self.adapter_dtype),
            device=weight.device,
            source=place.below(place.source),
            sink=place.below(place.sink),
        )
