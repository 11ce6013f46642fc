"""LLaMA-Adapter: attention layers also attend to a learnt prompt, behind a zero gate. Source: Zhang et al. 2023."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from peftk.adapters import checks
from peftk.methods import architectures, fields
from peftk.methods.fields import Names
from peftk.methods.plan import Plan
from peftk.methods.targets import check_called, target_modules
from peftk.nn.attached import check_attachable, submodule
from peftk.nn.llama_adapter import LlamaAdapter, Projections
from peftk.nn.parameters import default_adapter_dtype


@dataclasses.dataclass(frozen=True)
class LlamaAdapterConfig:
    """A prompt of adapter_len positions with zero-initialised gates in the self-attention of the topmost layers.

    adapter_len: L (10 in the paper). adapter_layers: how many of the topmost layers get one, counted in encoder and
    decoder each; None means all (in the paper 30 of 32). adapter_dtype: None means fp32 (fp64 in an fp64 model).
    attention, projections: for a model of no known family, its attention modules (names that end their dotted names, or
    a regular expression) and the names of their parts (`peftk.nn.Projections`). num_heads: None means the number in the
    model's config.

    |Φ| = L·d + heads per layer. Raises ValueError or TypeError for a bad field.

    Source: Zhang et al. 2023.
    """

    adapter_len: int = 10
    adapter_layers: int | None = None
    adapter_dtype: torch.dtype | None = None
    attention: Names | None = None
    projections: Projections | None = None
    num_heads: int | None = None

    def __post_init__(self) -> None:
        fields.set_fields(self, adapter_len=fields.count("adapter_len", self.adapter_len))
        for name in ("adapter_layers", "num_heads"):
            if getattr(self, name) is not None:
                fields.set_fields(self, **{name: fields.count(name, getattr(self, name))})
        if self.adapter_dtype is not None:
            checks.adapter_dtype(self.adapter_dtype)
        if (self.attention is None) != (self.projections is None):
            raise ValueError("attention: expected attention and projections together, got only one of them")
        if self.attention is not None:
            fields.set_fields(self, attention=fields.names("attention", self.attention))
            if self.adapter_layers is not None:
                raise ValueError("adapter_layers: expected None, as attention names the layers, got a number")

    def plan(self, model: nn.Module) -> Plan:
        """Raises ValueError or TypeError if the model's attention is unknown or does not have the expected form."""
        attention = self._attention(model)
        heads = self.num_heads
        if heads is None:
            heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
        if not isinstance(heads, int):
            raise ValueError(f"num_heads: expected a number, as the model's config does not tell it, got {heads!r}")
        for name, projections, _ in attention:
            for projection in (projections.query, projections.output):
                submodule(model.get_submodule(name), projection)
                check_called(model, "projections", f"{name}.{projection}")
        return Plan(
            attached=[
                (name, self._adapter(name, model.get_submodule(name), projections, heads, scaling))
                for name, projections, scaling in attention
            ]
        )

    def _attention(self, model: nn.Module) -> list[tuple[str, Projections, float | None]]:
        if self.attention is not None and self.projections is not None:
            return [(name, self.projections, None) for name in target_modules(model, "attention", self.attention)]
        known = architectures.known_layers(model, "attention")
        found = []
        for layer in architectures.topmost(known, self.adapter_layers, "adapter_layers"):
            family, name = layer.family, layer.path(layer.family.attention)
            if family.projections is None:
                raise ValueError(f"attention: expected one that calls its projections, got that of {layer.name}")
            attention, projections = model.get_submodule(name), family.projections
            if all(hasattr(attention, norm) for norm in ("q_norm", "k_norm")):
                projections = projections._replace(query_norm="q_norm", key_norm="k_norm")
            found.append((name, projections, family.scaling))
        return found

    def _adapter(
        self, name: str, attention: nn.Module, projections: Projections, heads: int, scaling: float | None
    ) -> LlamaAdapter:
        check_attachable(attention, LlamaAdapter.name)
        shapes = {p: architectures.linear_shape(submodule(attention, p)) for p in projections[:4]}
        for p, shape in shapes.items():
            if shape is None:
                raise ValueError(f"projections: expected {name}.{p} to be a linear, got a different module")
        (width, _), (_, d), (_, inner) = (shapes[p] for p in (projections.query, projections.key, projections.output))  # type: ignore[misc]
        packed = projections.key == projections.query
        if inner % heads or (width <= inner or (width - inner) % 2 if packed else width != inner):
            raise ValueError(
                f"projections: expected {name}.{projections.query} to compute the {inner} numbers of {heads} queries "
                f"that {projections.output} takes" + (", and keys and values" if packed else "") + f", got {width}"
            )
        weight = next(submodule(attention, projections.key).parameters(recurse=False))
        return LlamaAdapter(
            d,
            heads,
            projections,
            adapter_len=self.adapter_len,
            scaling=scaling,
            dtype=default_adapter_dtype(weight, self.adapter_dtype),
            device=weight.device,
        )
