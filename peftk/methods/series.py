"""Series adapters: y = h + s·act(h Aᵀ + a)Bᵀ + β after a block. Source: Houlsby et al. 2019."""

from __future__ import annotations

import dataclasses

from torch import nn

from peftk.methods import architectures
from peftk.methods.architectures import ATTENTION, MLP
from peftk.methods.fields import Names
from peftk.methods.places import BottleneckConfig, places
from peftk.methods.plan import Plan
from peftk.methods.targets import check_called
from peftk.nn.attached import check_attachable
from peftk.nn.parameters import default_adapter_dtype
from peftk.nn.series_adapter import SeriesAdapter


@dataclasses.dataclass(frozen=True)
class SeriesAdapterConfig(BottleneckConfig):
    """A bottleneck adapter after blocks of a model, inside their skip.

    bottleneck: R; or reduction_factor: d / R. Exactly one of them.
    where: "attention" (after its output projection) and "mlp", both by default (Houlsby); or names that end the dotted
    names of any modules; or one regular expression that matches these in full.
    activation: relu, gelu, gelu_tanh, silu or identity. scaling: s, no unit.
    leave_out: numbers of layers without adapters. adapter_dtype: None means fp32 (fp64 in an fp64 model).

    |Φ| = 2·d·R + R + d per place. Raises ValueError or TypeError for a bad field.

    Source: Houlsby et al. 2019.
    """

    where: Names = (ATTENTION, MLP)

    def plan(self, model: nn.Module) -> Plan:
        """Raises ValueError or TypeError if nothing matches, or a match cannot get an adapter."""
        attached = []
        for place in places(model, self.where, self.leave_out):
            check_attachable(model.get_submodule(place.sink), SeriesAdapter.name)
            check_called(model, "where", place.sink)
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
