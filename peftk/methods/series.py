"""Series adapters: y = h + s·act(h Aᵀ + a)Bᵀ + β behind a block. Source: Houlsby et al. 2019."""

from __future__ import annotations

import dataclasses

from torch import nn

from peftk.methods import architectures
from peftk.methods.architectures import ATTENTION, MLP
from peftk.methods.fields import Names
from peftk.methods.places import BottleneckConfig, places
from peftk.methods.plan import Plan
from peftk.methods.targets import called
from peftk.nn.attached import check_attachable
from peftk.nn.parameters import default_adapter_dtype
from peftk.nn.series_adapter import SeriesAdapter


@dataclasses.dataclass(frozen=True)
class SeriesAdapterConfig(BottleneckConfig):
    """A bottleneck adapter behind blocks of a model, inside their skip.

    bottleneck: R; or reduction_factor: d / R. Exactly one of them.
    where: "attention" (behind its output projection), "mlp", both (Houlsby, the default); and any modules, as names
    that end their dotted names, or one regular expression that matches them whole.
    activation: relu, gelu, gelu_tanh, silu or identity. scaling: s, dimensionless.
    leave_out: numbers of layers without adapters. adapter_dtype: None means fp32 (fp64 in an fp64 model).

    |Φ| = 2·d·R + R + d a place.
    """

    where: Names = (ATTENTION, MLP)

    def plan(self, model: nn.Module) -> Plan:
        """Raises ValueError or TypeError where nothing matches, or no adapter can hang on what matches."""
        attached = []
        for place in places(model, self.where, self.leave_out):
            check_attachable(model.get_submodule(place.sink), SeriesAdapter.name)
            called(model, "where", place.sink)
            d, weight = architectures.width_out(model, place.sink)
            adapter = SeriesAdapter(
                d,
                self.width(d),
                activation=self.activation,
                scaling=self.scaling,
                dtype=default_adapter_dtype(weight, self.adapter_dtype),
                device=weight.device,
            )
            attached.append((place.sink, adapter))
        return Plan(attached=attached)
