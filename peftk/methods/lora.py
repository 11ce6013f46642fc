"""LoRA: y = xWᵀ + b + s·(xAᵀ)Bᵀ beside frozen linears. Source: Hu et al. 2021; Kalajdzievski 2023 (rsLoRA)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from peftk.methods.plan import Plan
from peftk.methods.targets import (
    ALL_LINEAR,
    Names,
    check_layers,
    check_names,
    check_regex,
    inside,
    pattern_value,
    target_linears,
)
from peftk.nn.lora_linear import LoRALinear

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
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Names | None = None
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if not isinstance(pattern, Mapping):
                raise TypeError(f"{name}: expected a mapping of module patterns, got {type(pattern).__name__}")
        for name, r in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"{name}: expected an integer of 1 or more, got {r!r}")
        for name, alpha in [
            ("lora_alpha", self.lora_alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]:
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
                raise ValueError(f"{name}: expected a finite number, got {alpha!r}")
        if not isinstance(self.lora_dropout, (int, float)) or not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: expected 0 ≤ p < 1, got {self.lora_dropout!r}")
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in pattern:
                check_regex(f"{name}[{key!r}]", key)
        check_names("target_modules", self.target_modules, keyword=ALL_LINEAR)
        if self.exclude_modules is not None:
            check_names("exclude_modules", self.exclude_modules)
        if self.layers_pattern is not None:
            check_names("layers_pattern", self.layers_pattern)
        by_regex = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        if self.layers_to_transform is not None and by_regex:  # which can say the layers itself; PEFT refuses it, too
            raise ValueError("layers_to_transform: expected target_modules to be names, got a regular expression")
        check_layers("layers_to_transform", self._layers or ())
        if self.bias not in BIASES:
            raise ValueError(f"bias: expected one of {', '.join(BIASES)}, got {self.bias!r}")
        saved = self.modules_to_save
        if saved is not None and (isinstance(saved, str) or not all(isinstance(name, str) and name for name in saved)):
            raise ValueError(f"modules_to_save: expected a list of module names, got {saved!r}")

    @property
    def _layers(self) -> Sequence[int] | None:
        return [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform

    def wanted(self, model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
        """The linears to adapt, by every name, and the names of the model's own parameters that train besides.

        Raises ValueError or TypeError where nothing matches, or what matches cannot be replaced.
        """
        saved = self.modules_to_save or ()
        targets = target_linears(
            model,
            self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self._layers,
            layers_pattern=self.layers_pattern,
            modules_to_save=saved,
        )
        return targets, list(dict.fromkeys([*_saved_parameters(model, saved), *self._biases(model, targets)]))

    def plan(self, model: nn.Module) -> Plan:
        """Raises as `wanted`."""
        targets, trained = self.wanted(model)
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


def _saved_parameters(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """The parameters of the modules that train whole. Raises ValueError for a name that matches none."""
    names = []
    for kept in modules_to_save:
        found = [name for name, _ in model.named_parameters() if inside(name.rpartition(".")[0], kept)]
        if not found:
            raise ValueError(f"modules_to_save: expected names of modules that have parameters, got {kept!r}")
        names += found
    return names
