"""A whole model: put LoRA layers in, freeze, count, save and load."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from peftk import functional
from peftk.interop import peft_checkpoint
from peftk.interop.peft_checkpoint import CheckpointError
from peftk.nn import LoRALinear
from peftk.nn.replace import replaceable

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What `inject` puts where; fields and meanings as in HF PEFT.

    target_modules: names that end a module's dotted name (["query", "value"]), a regular expression that matches it
    whole, or "all-linear": every nn.Linear but the model's output embedding. rank_pattern and alpha_pattern give
    modules their own r and lora_alpha. adapter_dtype: of A and B; None means fp32 (fp64 in an fp64 model).
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] = ALL_LINEAR
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    adapter_dtype: torch.dtype | None = None

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
                _regex(f"{name}[{key!r}]", key)
        targets = self.target_modules
        if isinstance(targets, str) and targets:
            _regex("target_modules", targets)
        elif not isinstance(targets, Sequence) or not targets or not all(isinstance(t, str) for t in targets):
            raise ValueError(f"target_modules: expected names, a regular expression or {ALL_LINEAR!r}, got {targets!r}")


def _regex(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: expected a regular expression, got {pattern!r} ({error})") from error


def inject(model: nn.Module, config: LoraConfig) -> list[str]:
    """Freezes `model` and replaces its target linears by LoRALinear, in place. Outputs are unchanged (B = 0).

    Returns the names of the replaced modules.

    Raises:
        ValueError, TypeError: nothing matches, or what matches cannot be replaced; the model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    targets = _targets(model, config)
    layers: dict[int, LoRALinear] = {}  # a linear that stands in two places stays one layer
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, linear in targets.items():
            r = peft_checkpoint.pattern_value(config.rank_pattern, name, config.r)
            layers.setdefault(
                id(linear),
                LoRALinear.from_linear(
                    linear,
                    r=r,
                    lora_alpha=peft_checkpoint.pattern_value(config.alpha_pattern, name, config.lora_alpha),
                    lora_dropout=config.lora_dropout,
                    use_rslora=config.use_rslora,
                    adapter_dtype=config.adapter_dtype,
                ),
            )
    except BaseException:
        for parameter, required in before:
            parameter.requires_grad_(required)
        raise
    freeze(model)
    for name, linear in targets.items():
        replace_module(model, name, layers[id(linear)])
    return list(targets)


def freeze(model: nn.Module) -> nn.Module:
    """Makes every parameter frozen but those of adapters; returns the model."""
    trainable = {id(p) for _, layer in lora_layers(model) for p in (layer.lora_A, layer.lora_B)}
    for parameter in model.parameters():
        if id(parameter) not in trainable:
            parameter.requires_grad_(False)
    return model


class ParameterCount(NamedTuple):
    """|Φ| parameters are trained, of |Θ| in all (adapters included); ratio = |Φ|/|Θ|."""

    trainable: int
    total: int

    @property
    def ratio(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"|Φ| = {self.trainable:,} trainable of |Θ| = {self.total:,} parameters ({100 * self.ratio:.3f} %)"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts each parameter once, however many modules share it."""
    parameters = list(model.parameters())
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad), total=sum(p.numel() for p in parameters)
    )


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The model's LoRALinear layers by name, each once."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the adapters of an injected model as a checkpoint that HF PEFT, and `MultiAdapter.load`, read.

    Raises ValueError where the model holds no LoRALinear. A failure leaves an earlier checkpoint as it was.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model: expected LoRALinear layers (peftk.inject puts them in), got none")
    first = next(iter(layers.values()))
    use_rslora = first.use_rslora
    alphas = {name: layer.lora_alpha for name, layer in layers.items()}
    if any(layer.use_rslora != use_rslora for layer in layers.values()):
        # the format has one flag for all layers: say the same scalings without it
        use_rslora, alphas = False, {name: layer.scaling * layer.r for name, layer in layers.items()}
    alpha = next(iter(alphas.values()))
    config: dict[str, Any] = {
        "r": first.r,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": use_rslora,
        "target_modules": _target_modules(model, layers),
        "rank_pattern": {f"^{re.escape(n)}": layer.r for n, layer in layers.items() if layer.r != first.r},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "task_type": None,
        "inference_mode": True,
    }
    peft_checkpoint.save(path, {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}, config)


def _target_modules(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str] | str:
    """The layers' names for a PEFT config; a regular expression where a name alone would match other modules too."""
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in layers]
    if any(other.endswith(f".{name}") for other in others for name in layers):
        return "|".join(re.escape(name) for name in sorted(layers))
    return sorted(layers)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a checkpoint into the LoRALinear layers of an injected model: factors, lora_alpha and use_rslora.

    Raises CheckpointError where it does not fit the model layer by layer, ValueError where a layer is merged; the model
    is unchanged then.
    """
    loaded = peft_checkpoint.load(path)
    layers = dict(lora_layers(model))
    if loaded.keys() != layers.keys():
        raise CheckpointError(
            f"{path}: expected adapters for exactly the model's LoRALinear layers; missing there: "
            f"{sorted(layers.keys() - loaded.keys())}, unknown here: {sorted(loaded.keys() - layers.keys())}"
        )
    for name, layer in layers.items():
        adapter = loaded[name]
        if layer.merged:
            raise ValueError(f"model: expected {name} to be unmerged before its adapter changes, got a merged layer")
        if adapter.lora_A.shape != layer.lora_A.shape or adapter.lora_B.shape != layer.lora_B.shape:
            raise CheckpointError(
                f"{path}: {name}: expected factors {list(layer.lora_A.shape)} and {list(layer.lora_B.shape)}, "
                f"got {list(adapter.lora_A.shape)} and {list(adapter.lora_B.shape)}"
            )
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(loaded[name].lora_A)
            layer.lora_B.copy_(loaded[name].lora_B)
            layer.lora_alpha, layer.use_rslora = loaded[name].lora_alpha, loaded[name].use_rslora


def merge_adapter(model: nn.Module) -> None:
    """Merges every LoRALinear of an injected model that isn't merged, all in one go: `functional.merge_layers_`.

    Raises ValueError, with the layer's name, where a W + s·BA would not be finite; no layer has changed then.
    """
    layers = [(name, layer) for name, layer in lora_layers(model) if not layer.merged]
    with _named(layers):
        receipts = functional.merge_layers_(
            [layer.weight.detach() for _, layer in layers],
            [layer.lora_A for _, layer in layers],
            [layer.lora_B for _, layer in layers],
            [layer.scaling for _, layer in layers],
        )
    for (_, layer), receipt in zip(layers, receipts, strict=True):
        layer.receipt = receipt


def unmerge_adapter(model: nn.Module) -> None:
    """Unmerges every merged LoRALinear of an injected model, to the bit, all in one go.

    Raises ValueError, with the layer's name, where a W is not what the merge left; no layer has changed then.
    """
    layers = [(name, layer) for name, layer in lora_layers(model) if layer.receipt is not None]
    weights = [layer.weight.detach() for _, layer in layers]
    receipts = [layer.receipt.to(layer.weight.device) for _, layer in layers if layer.receipt is not None]
    with _named(layers):
        functional.unmerge_layers_(weights, receipts)
    for _, layer in layers:
        layer.receipt = None


@contextlib.contextmanager
def _named(layers: Sequence[tuple[str, LoRALinear]]) -> Iterator[None]:
    """An error that names a layer of the list by its number names it by its name instead."""
    try:
        yield
    except (TypeError, ValueError) as error:
        number = re.match(r"layer (\d+): ", str(error))
        if number is None:
            raise
        raise type(error)(f"{layers[int(number[1])][0]}: {str(error)[number.end() :]}") from None


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` where the module `name` is."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, nn.TransformerEncoderLayer):
        # its inference fast path reads linear1.weight itself and would pass the adapter by
        parent.activation_relu_or_gelu = 0
    steps = parent_name.split(".")
    for depth in range(len(steps)):
        above = model.get_submodule(".".join(steps[:depth]))
        if isinstance(above, nn.TransformerEncoder):
            # only that fast path takes the nested tensors that it makes of padded batches
            above.use_nested_tensor = False
    setattr(parent, child, layer)


def _targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Linear]:
    """The linears to replace, by name; every name under which one is reached."""
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and not _inside_lora(model, name)
    }
    wanted = config.target_modules
    if wanted == ALL_LINEAR:
        head = _output_embedding(model)
        found = {n: m for n, m in linears.items() if m is not head and not bypassed(m)}
    elif isinstance(wanted, str):
        found = {n: m for n, m in linears.items() if re.fullmatch(wanted, n)}
    else:
        found = {n: m for n, m in linears.items() if any(n == t or n.endswith(f".{t}") for t in wanted)}
    if not found:
        names = ", ".join(list(linears)[:8]) or "none"
        raise ValueError(f"target_modules: expected to match some nn.Linear of the model ({names}, …), got {wanted!r}")
    if "" in found:
        raise ValueError("model: expected a module that contains linears, got an nn.Linear; use LoRALinear.from_linear")
    for name, linear in found.items():
        replaceable(linear)
        if bypassed(linear):
            raise ValueError(
                f"target_modules: expected linears that are called, got {name}, whose weight MHA reads itself"
            )
    return found


def _inside_lora(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return isinstance(model.get_submodule(parent), LoRALinear) if name else False


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def bypassed(linear: nn.Module) -> bool:
    """nn.MultiheadAttention reads the weight of its out_proj and never calls it: an adapter there would do nothing."""
    return isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
