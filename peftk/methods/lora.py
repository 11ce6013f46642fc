"""LoRA: y = xWᵀ + b + s·(xAᵀ)Bᵀ beside frozen linears. Source: Hu et al. 2021; Kalajdzievski 2023 (rsLoRA)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import nn

from peftk.methods import fields
from peftk.methods.fields import Names
from peftk.methods.plan import Plan, is_adapter_parameter
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
    """LoRA on the linears (nn.Linear, Conv1D) of a model. Fields have the names and meanings of HF PEFT.

    target_modules: names that end a module's dotted name (["query", "value"]); or a regular expression that matches it
    in full; or "all-linear", every linear except the model's output embedding. exclude_modules: some of these to leave
    out.
    layers_to_transform: numbers of the layers to adapt, None for all; layers_pattern: the name before that number.
    rank_pattern, alpha_pattern: a different r and lora_alpha for some modules.
    lora_dropout: probability with which the adapter does not see an element of x in training.
    lora_bias: whether the adapters have a bias of their own, s·(BAx + b).
    bias: which biases of the base model train too: "none", "all", or "lora_only" (those of adapted linears).
    modules_to_save: names of modules that train in full, such as a new classification head.
    fan_in_fan_out: has no effect, as each layer knows how it stores its weight; accepted for compatibility with PEFT.
    adapter_dtype: of A and B; None means fp32 (fp64 in an fp64 model).

    s = lora_alpha / r, or lora_alpha / √r with use_rslora; it has no unit. |Φ| = r·(K + N) per linear. Raises
    ValueError or TypeError for a bad field.

    Source: Hu et al. 2021; Kalajdzievski 2023 (rsLoRA).
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
        fields.set_fields(
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
        for name in self.modules_to_save or ():
            fields.regex(f"modules_to_save[{name!r}]", name)  # PEFT uses it as one
        self._settle_layers()

    def _settle_layers(self) -> None:
        """Checks the layers. Like PEFT, refuses them next to a regular expression, which can select layers itself."""
        by_regex = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        for name in ("layers_to_transform", "layers_pattern"):
            if by_regex and getattr(self, name) is not None:
                raise ValueError(f"{name}: expected target_modules to be names, got a regular expression")
        layers, pattern = self.layers_to_transform, fields.optional_names("layers_pattern", self.layers_pattern)
        if pattern is not None and layers is None:
            raise ValueError(f"layers_pattern: expected layers_to_transform with it, got only {pattern!r}")
        if pattern is not None:
            check_layers_pattern(pattern)
        if layers is not None:
            numbers = fields.layer_numbers("layers_to_transform", layers)
            # to PEFT an empty list means None, but no other empty value does
            if not numbers and not isinstance(layers, list):
                raise ValueError(f"layers_to_transform: expected some layer number, got {layers!r}")
            layers = numbers or None
        fields.set_fields(self, layers_to_transform=layers, layers_pattern=pattern)

    def wanted(self, model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
        """The linears to adapt, under each of their names, and the names of the model's own parameters that train too.

        Raises ValueError or TypeError if nothing matches, or a match cannot be adapted or trained in full.
        """
        linears, trained, _ = self._wanted(model)
        return linears, trained

    def _wanted(self, model: nn.Module) -> tuple[dict[str, nn.Module], list[str], list[str]]:
        """`wanted`, and texts about what in the config has no effect on this model."""
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
            kind = "module" if self.bias == "all" else "target"
            idle.append(f"bias: {self.bias!r} trains none, as no {kind} has one")
        linear_name = next((name for name, linear in linears.items() if not fan_in_fan_out(linear)), None)
        if self.fan_in_fan_out and linear_name is not None:
            idle.append(f"fan_in_fan_out: True has no effect on {linear_name}, as an nn.Linear knows how it is stored")
        return linears, list(dict.fromkeys([*saved, *biases])), idle

    def plan(self, model: nn.Module) -> Plan:
        """Raises as `wanted`. Warns about fields that have no effect on this model."""
        targets, trained, idle = self._wanted(model)
        for message in idle:
            warn(message)
        made: dict[int, LoRALinear] = {}  # a linear with two names becomes one layer
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
    """The parameters of the modules that train in full, except those of adapters.

    Raises ValueError or TypeError if a name does not match such a module, or if a parameter belongs to an earlier
    module that is not one of them.
    """
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    names: dict[str, None] = {}
    for module in saved_modules(model, modules_to_save):
        for name, parameter in model.get_submodule(module).named_parameters(module, remove_duplicate=False):
            first = owners[id(parameter)]
            if not any(inside(first.rpartition(".")[0], saved) for saved in modules_to_save):
                raise ValueError(
                    f"modules_to_save: expected modules with parameters of their own, got {name}, which is also {first}"
                )
            names[first] = None
    return [name for name in names if not is_adapter_parameter(model, name)]
