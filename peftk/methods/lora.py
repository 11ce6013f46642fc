"""LoRA: y = xWᵀ + b + s·(xAᵀ)Bᵀ beside frozen linears. Source: Hu et al. 2021; Kalajdzievski 2023 (rsLoRA)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import nn

from peftk.methods import fields
from peftk.methods.fields import Names
from peftk.methods.plan import Plan, of_adapter
from peftk.methods.targets import (
    ALL_LINEAR,
    check_layers_pattern,
    idle_keys,
    inside,
    pattern_value,
    saved_modules,
    target_linears,
    warn,
)
from peftk.nn.lora_linear import LoRALinear
from peftk.nn.replace import fan_in_fan_out

BIASES = ("none", "all", "lora_only")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA on the linears (nn.Linear, Conv1D) of a model; fields and meanings as in HF PEFT.

    target_modules: names that end a module's dotted name (["query", "value"]), a regular expression that matches it
    whole, or "all-linear": every linear but the model's output embedding. exclude_modules takes some of them out.
    layers_to_transform: numbers of the layers to adapt, None for all; layers_pattern: the name before that number.
    rank_pattern and alpha_pattern give modules their own r and lora_alpha.
    lora_bias: whether the adapters have a bias of their own, s·(BAx + b).
    bias: which biases of the base model train besides: "none", "all", or "lora_only" (those of adapted linears).
    modules_to_save: names of modules that train whole, a new classification head, say.
    fan_in_fan_out: nothing to say; each layer knows how it stores its weight. Taken for PEFT's sake.
    adapter_dtype: of A and B; None means fp32 (fp64 in an fp64 model).

    s = lora_alpha / r, or lora_alpha / √r with use_rslora (dimensionless). |Φ| = r·(K + N) a linear.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: Names = ALL_LINEAR
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    adapter_dtype: torch.dtype | None = None
    exclude_modules: Names | None = None
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Names | None = None
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: Collection[str] | None = None
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        patterns = {}
        for name, check in (("rank_pattern", fields.count), ("alpha_pattern", fields.number)):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise TypeError(f"{name}: expected a mapping of module patterns, got {type(pattern).__name__}")
            for key in pattern:
                fields.regex(f"{name}[{key!r}]", key)
            patterns[name] = {key: check(f"{name}[{key!r}]", value) for key, value in pattern.items()}
        p = fields.number("lora_dropout", self.lora_dropout)
        if not 0.0 <= p < 1.0:
            raise ValueError(f"lora_dropout: expected 0 ≤ p < 1, got {p!r}")
        if self.bias not in BIASES:
            raise ValueError(f"bias: expected one of {', '.join(BIASES)}, got {self.bias!r}")
        fields.settle(
            self,
            **patterns,
            r=fields.count("r", self.r),
            lora_alpha=fields.number("lora_alpha", self.lora_alpha),
            lora_dropout=p,
            target_modules=fields.names("target_modules", self.target_modules, keyword=ALL_LINEAR),
            **{name: fields.flag(name, getattr(self, name)) for name in ("use_rslora", "lora_bias", "fan_in_fan_out")},
            exclude_modules=fields.optional_names("exclude_modules", self.exclude_modules),
            modules_to_save=fields.optional_list("modules_to_save", self.modules_to_save),
        )
        for kept in self.modules_to_save or ():
            fields.regex(f"modules_to_save[{kept!r}]", kept)  # to PEFT it is one
        self._settle_layers()

    def _settle_layers(self) -> None:
        """As PEFT does, refuses numbers and patterns beside a regular expression, which can say the layers itself."""
        by_regex = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        for name in ("layers_to_transform", "layers_pattern"):
            if by_regex and getattr(self, name) is not None:
                raise ValueError(f"{name}: expected target_modules to be names, got a regular expression")
        layers, pattern = self.layers_to_transform, fields.optional_names("layers_pattern", self.layers_pattern)
        if pattern is not None and layers is None:
            raise ValueError(f"layers_pattern: expected layers_to_transform with it, got {pattern!r} alone")
        if pattern is not None:
            check_layers_pattern(pattern)
        if layers is not None:
            numbers = fields.layer_numbers("layers_to_transform", layers)
            # PEFT takes an empty list, and nothing else that is empty, for None
            if not numbers and not isinstance(layers, list):
                raise ValueError(f"layers_to_transform: expected some layer number, got {layers!r}")
            layers = numbers or None
        fields.settle(self, layers_to_transform=layers, layers_pattern=pattern)

    def wanted(self, model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
        """The linears to adapt, by every name, and the names of the model's own parameters that train besides.

        Raises ValueError or TypeError where nothing matches, or what matches cannot be adapted, or train whole.
        """
        linears, trained, _ = self._wanted(model)
        return linears, trained

    def _wanted(self, model: nn.Module) -> tuple[dict[str, nn.Module], list[str], list[str]]:
        """`wanted`, and, in words, what of the config has no effect on this model."""
        saved = _saved_parameters(model, self.modules_to_save or ())
        linears, idle = target_linears(
            model,
            self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,  # type: ignore[arg-type]  # __post_init__ made a tuple of it
            layers_pattern=self.layers_pattern,
            modules_to_save=self.modules_to_save or (),
        )
        biases = self._biases(model, linears)
        idle += idle_keys("rank_pattern", self.rank_pattern, linears)
        idle += idle_keys("alpha_pattern", self.alpha_pattern, linears)
        if self.bias != "none" and not biases:
            who = "module" if self.bias == "all" else "target"
            idle.append(f"bias: {self.bias!r} trains none, as no {who} has one")
        stored = next((name for name, linear in linears.items() if not fan_in_fan_out(linear)), None)
        if self.fan_in_fan_out and stored is not None:
            idle.append(f"fan_in_fan_out: True has no effect on {stored}, an nn.Linear, which knows how it is stored")
        return linears, list(dict.fromkeys([*saved, *biases])), idle

    def plan(self, model: nn.Module) -> Plan:
        """Raises as `wanted`. Warns of what has no effect on this model."""
        targets, trained, idle = self._wanted(model)
        for what in idle:
            warn(what)
        made: dict[int, LoRALinear] = {}  # a linear that stands in two places stays one layer
        layers = {}
        for name, linear in targets.items():
            if id(linear) not in made:
                made[id(linear)] = LoRALinear.from_linear(
                    linear,
                    r=pattern_value(self.rank_pattern, name, self.r),
                    lora_alpha=pattern_value(self.alpha_pattern, name, self.lora_alpha),
                    lora_dropout=self.lora_dropout,
                    use_rslora=self.use_rslora,
                    adapter_dtype=self.adapter_dtype,
                    lora_bias=self.lora_bias,
                )
            layers[name] = made[id(linear)]
        return Plan(layers=layers, trained=trained)

    def _biases(self, model: nn.Module, targets: Mapping[str, nn.Module]) -> list[str]:
        if self.bias == "none":
            return []
        if self.bias == "lora_only":
            return [f"{name}.bias" for name, linear in targets.items() if linear.bias is not None]
        return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]


def _saved_parameters(model: nn.Module, modules_to_save: Collection[str]) -> list[str]:
    """The parameters of the modules that train whole, but those of adapters.

    Raises ValueError or TypeError for names that mean no such modules, and for a parameter that is another module's
    first.
    """
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    names: dict[str, None] = {}
    for module in saved_modules(model, modules_to_save):
        for name, parameter in model.get_submodule(module).named_parameters(module, remove_duplicate=False):
            first = owners[id(parameter)]
            if not any(inside(first.rpartition(".")[0], kept) for kept in modules_to_save):
                raise ValueError(
                    f"modules_to_save: expected modules with parameters of their own, got {name}, which is {first} too"
                )
            names[first] = None
    return [name for name in names if not of_adapter(model, name)]
