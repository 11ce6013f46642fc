"""Bottleneck adapters in exactly the places where the adapters library (AdapterHub) puts them, per architecture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from peftk.methods import architectures, fields
from peftk.methods.architectures import FAMILIES
from peftk.methods.parallel import ParallelAdapterConfig
from peftk.methods.places import set_bottleneck_fields
from peftk.methods.plan import Plan
from peftk.methods.series import SeriesAdapterConfig
from peftk.methods.targets import warn
from peftk.nn.attached import Attached, check_attachable
from peftk.nn.parallel_adapter import ParallelAdapter
from peftk.nn.parameters import default_adapter_dtype
from peftk.nn.placed_adapters import NormAdapter, StreamAdapter
from peftk.nn.series_adapter import SeriesAdapter

SERIES, BEFORE_NORM, AFTER_NORM, PARALLEL = PLACEMENTS = ("series", "before_norm", "after_norm", "parallel")
ATTENTION, OUTPUT, CROSS = ROLES = ("attention_adapter", "output_adapter", "cross_adapter")


@dataclasses.dataclass(frozen=True)
class Site:
    """A block of a layer with its skip: the names of its modules relative to the layer ("" is the layer itself).

    key: the module under which AdapterHub keeps the adapter. source, sink: submodules of `owner`; x is the first
    argument of source, h the output of sink, and z = x + h. norm: the LayerNorm of z in models that normalise after the
    skip. stream: the module that returns z in models that normalise before it.
    """

    key: str
    owner: str
    source: str
    sink: str
    norm: str | None = None
    stream: str | None = None


def _t5(key: str) -> Site:
    return Site(key, key, "layer_norm", "dropout", stream="")


_SITES: dict[str, dict[str, Site]] = {
    "bert": {
        ATTENTION: Site("attention.output", "attention", "self", "output.dropout", norm="output.LayerNorm"),
        OUTPUT: Site("output", "", "intermediate", "output.dropout", norm="output.LayerNorm"),
    },
    "gpt2": {
        ATTENTION: Site("attention_adapters", "", "ln_1", "attn"),
        OUTPUT: Site("output_adapters", "", "ln_2", "mlp", stream=""),
    },
    "llama": {
        ATTENTION: Site("attention_adapters", "", "input_layernorm", "self_attn"),
        OUTPUT: Site("output_adapters", "", "post_attention_layernorm", "mlp", stream=""),
    },
    "t5 encoder": {ATTENTION: _t5("layer.0"), OUTPUT: _t5("layer.1")},
    "t5 decoder": {ATTENTION: _t5("layer.0"), CROSS: _t5("layer.1"), OUTPUT: _t5("layer.2")},
}


@dataclasses.dataclass(frozen=True)
class FoundSite:
    """A site in a model: its role, the number of its layer, AdapterHub's key for it, and the names of its modules."""

    role: str
    number: int
    key: str
    owner: str
    source: str
    sink: str
    norm: str | None
    stream: str | None


@dataclasses.dataclass(frozen=True)
class AdapterHubConfig:
    """Bottleneck adapters f(v) = s·act(v Aᵀ + a)Bᵀ + β with the meaning of a BnConfig of the adapters library.

    mh_adapter, output_adapter, cross_adapter: whether there are adapters after attention, after the feed-forward block,
    and after cross-attention (T5's decoder). x is the input of a block's skip, h what the block adds to it, z = x + h.
    placement:

        "series"       h becomes h + f(h): Houlsby's, DoubleSeqBnConfig
        "before_norm"  z becomes z + f(LN(z)), before the LayerNorm, in models that normalise after the skip (BERT);
                       z + f(z) in models that normalise before it (GPT-2, Llama, T5): Pfeiffer's, SeqBnConfig
        "after_norm"   LN(z) becomes LN(z) + f(LN(z)); z becomes z + f(z) in models that normalise before the skip
        "parallel"     h becomes h + f(x): ParBnConfig; x is taken before the LayerNorm if there is one

    reduction_factor: R = d // reduction_factor, at least 1; one number, or numbers by layer ({"1": 8, "default": 16}).
    activation: relu, gelu, gelu_tanh, silu or identity. scaling: s, no unit. leave_out: numbers of layers without
    adapters; decoder layers are numbered after the encoder's. adapter_dtype: None means fp32 (fp64 in an fp64 model).

    |Φ| = 2·d·R + R + d per place. Raises ValueError or TypeError for a bad field.

    Source: Poth et al. 2023; Houlsby et al. 2019; Pfeiffer et al. 2020; He et al. 2021.
    """

    mh_adapter: bool = True
    output_adapter: bool = True
    cross_adapter: bool = False
    reduction_factor: float | Mapping[str, float] = 16
    placement: str = SERIES
    activation: str = "relu"
    scaling: float = 1.0
    leave_out: Collection[int] = ()
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not self._roles:
            raise ValueError(
                "mh_adapter: expected at least one of mh_adapter, output_adapter and cross_adapter, got none"
            )
        if isinstance(self.reduction_factor, Mapping):
            if not self.reduction_factor or not all(isinstance(key, str) for key in self.reduction_factor):
                raise ValueError(f"reduction_factor: expected layer numbers as strings, got {self.reduction_factor!r}")
            factor: Any = {
                key: fields.positive(f"reduction_factor[{key!r}]", value)
                for key, value in self.reduction_factor.items()
            }
        else:
            factor = fields.positive("reduction_factor", self.reduction_factor)
        fields.set_fields(self, reduction_factor=factor)
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement: expected one of {', '.join(PLACEMENTS)}, got {self.placement!r}")
        set_bottleneck_fields(self)

    @property
    def _roles(self) -> tuple[str, ...]:
        flags = (self.mh_adapter, self.output_adapter, self.cross_adapter)
        return tuple(role for role, flag in zip(ROLES, flags, strict=True) if flag)

    def sites(self, model: nn.Module) -> list[FoundSite]:
        """The sites that get an adapter. Raises ValueError if the model's layers are of no known family."""
        found = [s for s in sites(model) if s.role in self._roles and s.number not in self.leave_out]
        if not found:
            raise ValueError(f"leave_out: expected some site to remain, got {list(self.leave_out)}, which leaves none")
        return found

    def bottleneck(self, d: int, layer: int) -> int:
        """R in a layer. Raises ValueError if the reduction factors have neither this layer nor a default."""
        factor = self.reduction_factor
        if isinstance(factor, Mapping):
            found = factor.get(str(layer), factor.get("default"))
            if found is None:
                raise ValueError(f"reduction_factor: expected one for layer {layer} or a default, got {dict(factor)!r}")
            factor = found
        return max(1, int(d // factor))

    def plan(self, model: nn.Module) -> Plan:
        """Raises ValueError or TypeError if the model is of no known family or has such adapters already.

        Warns if the model lacks a layer of leave_out.
        """
        numbers = {site.number for site in sites(model)}
        for number in self.leave_out:
            if number not in numbers:
                warn(f"leave_out: the model has no layer {number}")
        return Plan(attached=[self._adapter(model, site) for site in self.sites(model)])

    def _adapter(self, model: nn.Module, site: FoundSite) -> tuple[str, Attached]:
        d, weight = architectures.width_out(model, site.sink)
        kind, where = _class_and_module(self.placement, site)
        parts = {}
        if kind in (ParallelAdapter, StreamAdapter):
            parts = {name: getattr(site, name)[len(where) :].lstrip(".") for name in ("source", "sink")}
        check_attachable(model.get_submodule(where), site.role)
        adapter = kind(
            d,
            self.bottleneck(d, site.number),
            activation=self.activation,
            scaling=self.scaling,
            dtype=default_adapter_dtype(weight, self.adapter_dtype),
            device=weight.device,
            **parts,
        )
        adapter.name = site.role
        return where, adapter


def as_adapterhub(model: nn.Module, config: Any) -> tuple[AdapterHubConfig, dict[str, str]]:
    """The AdapterHub config equal to an injected config, and the names of the adapters' modules by AdapterHub's keys.

    Raises ValueError if the config puts adapters where AdapterHub has no place for them.
    """
    if isinstance(config, AdapterHubConfig):
        return config, {site.key: f"{holder(config.placement, site)}.{site.role}" for site in config.sites(model)}
    if not isinstance(config, (SeriesAdapterConfig, ParallelAdapterConfig)):
        raise ValueError(f"config: expected bottleneck adapters, got {type(config).__name__}")
    where = {config.where} if isinstance(config.where, str) else set(config.where)
    roles = {ATTENTION: "attention", OUTPUT: "mlp"}
    if not where <= set(roles.values()):
        raise ValueError(f"where: expected attention and mlp, the places of AdapterHub, got {config.where!r}")
    placement = SERIES if isinstance(config, SeriesAdapterConfig) else PARALLEL
    paths, widths = {}, {}
    for site in sites(model):
        if roles.get(site.role) in where and site.number not in config.leave_out:
            path = f"{holder(placement, site)}.{placement}_adapter"
            adapter = dict(model.named_modules()).get(path)
            if not isinstance(adapter, (SeriesAdapter, ParallelAdapter)):
                raise ValueError(
                    f"where: expected an adapter whose input is that of {site.source}, as in AdapterHub, got one after "
                    "a LayerNorm"
                )
            paths[site.key], widths[str(site.number)] = path, _reduction_factor(adapter.in_features, adapter.bottleneck)
    same = len(set(widths.values())) == 1
    return (
        AdapterHubConfig(
            mh_adapter="attention" in where,
            output_adapter="mlp" in where,
            reduction_factor=next(iter(widths.values())) if same else widths,
            placement=placement,
            activation=config.activation,
            scaling=config.scaling,
            leave_out=config.leave_out,
        ),
        paths,
    )


def _reduction_factor(d: int, R: int) -> float:
    """A number f with d // f = R."""
    factor = d / R
    while int(d // factor) < R:
        factor = math.nextafter(factor, 0.0)
    return factor


def sites(model: nn.Module) -> list[FoundSite]:
    """Every site of the model, in the order of its layers. Raises ValueError if its layers are of no known family."""
    found = []
    for layer in architectures.known_layers(model, "model"):
        family = next(name for name, family in FAMILIES.items() if family is layer.family)
        for role, site in _SITES.get(family, {}).items():
            owner = layer.path(site.owner)
            below = {
                name: None if part is None else ".".join(n for n in (owner, part) if n)
                for name, part in (("norm", site.norm), ("stream", site.stream))
            }
            found.append(
                FoundSite(
                    role,
                    layer.number,
                    layer.path(site.key),
                    owner,
                    f"{owner}.{site.source}",
                    f"{owner}.{site.sink}",
                    below["norm"],
                    below["stream"],
                )
            )
    if not found:
        raise ValueError(f"model: expected layers as of {', '.join(_SITES)}, got those of {type(model).__name__}")
    return found


def holder(placement: str, site: FoundSite) -> str:
    """The name of the module to which the adapter of a placement is attached."""
    return _class_and_module(placement, site)[1]


def _class_and_module(placement: str, site: FoundSite) -> tuple[Any, str]:
    if placement == PARALLEL:
        return ParallelAdapter, site.owner
    if placement == SERIES:
        return SeriesAdapter, site.sink
    if site.norm is not None:
        return (NormAdapter if placement == BEFORE_NORM else SeriesAdapter), site.norm
    return (StreamAdapter, site.owner) if site.stream is None else (SeriesAdapter, site.stream)
