"""Reads and writes HF PEFT's LoRA checkpoints.

A checkpoint is a folder with `adapter_config.json` (peft_type "LORA", hyper-parameters) and
`adapter_model.safetensors`. Every key begins with `base_model.model.`, followed by

    <linear>.lora_A.weight [R, K]   <linear>.lora_B.weight [N, R]   however the linear stores its own weight
    <linear>.lora_B.bias [N]        with lora_bias: b of s·(BAx + b)
    <linear>.base_layer.bias [N]    with bias "all" or "lora_only": the trained bias of an adapted linear
    <module>.bias                   with bias "all": the trained bias of any other module
    <module>.<parameter or buffer>  of a module in modules_to_save, which trains in full
    <embedding>.weight, .bias       the base model's own embeddings, if their size was changed
    <linear>.base_layer.weight      the same for an adapted embedding (lm_head)

The scaling is lora_alpha / r, or lora_alpha / √r with use_rslora; rank_pattern and alpha_pattern give some modules
different values. Source: peft 0.21, utils/save_and_load.py and its files.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftk.checkpoints import files
from peftk.checkpoints.contents import (
    AnyPath,
    Contents,
    Origin,
    about_of,
    embeddings,
    every_lora_layer,
    lora_configs,
    named_values,
    one_scaling,
    origin_of,
    same_rank,
    saved_names,
    tied,
    values_of,
    with_aliases,
    within,
)
from peftk.checkpoints.files import CONFIG_FILE, CheckpointError, plain_name
from peftk.methods.inject import lora_layers
from peftk.methods.lora import BIASES, LoraConfig
from peftk.methods.plan import injections
from peftk.methods.targets import pattern_value

WEIGHTS_FILE = "adapter_model.safetensors"
_LARGEST = sys.float_info.max
_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_A, _B, _B_BIAS, _BASE = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".base_layer"
_NAMED = re.compile(r"(\.lora_[AB])\.default(\.(?:weight|bias))$")


class LoadedAdapter(NamedTuple):
    """One linear's adapter from a checkpoint: s·(BAx + b) with lora_A [R, K], lora_B [N, R], b = lora_bias [N] or 0.

    s = lora_alpha / R, or lora_alpha / √R with use_rslora; it has no unit.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_alpha: float
    use_rslora: bool
    lora_bias: Tensor | None = None

    @property
    def scaling(self) -> float:
        return scaling(self.lora_alpha, self.lora_A.shape[0], self.use_rslora)


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
    """A LoRA checkpoint, checked for consistency.

    adapters: by the linear's name. biases: trained biases, by their names in the base model (`<module>.bias`). saved:
    parameters and buffers of the modules that were trained in full, by their names in the base model. base: frozen
    weights of the base model's embeddings, by name. about: the config's fields about the base model.
    """

    path: Path
    config: Mapping[str, Any]
    adapters: Mapping[str, LoadedAdapter]
    biases: Mapping[str, Tensor]
    saved: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    about: Mapping[str, str]

    def lora_config(self, adapter_dtype: torch.dtype | None = None) -> LoraConfig:
        """The config with which `peftk.inject` puts in this checkpoint's adapters."""
        config = self.config
        # PEFT names heads that a model may not have ("classifier" and "score" for SEQ_CLS): keep those that were saved
        present = [m for m in config.get("modules_to_save") or () if any(within(name, m) for name in self.saved)]
        try:
            return LoraConfig(
                r=config["r"],
                lora_alpha=config["lora_alpha"],
                target_modules=config.get("target_modules"),  # type: ignore[arg-type]  # LoraConfig checks it
                exclude_modules=config.get("exclude_modules") or None,
                layers_to_transform=config.get("layers_to_transform"),
                layers_pattern=config.get("layers_pattern") or None,
                lora_dropout=config.get("lora_dropout") or 0.0,
                use_rslora=bool(config.get("use_rslora")),
                rank_pattern=config.get("rank_pattern") or {},
                alpha_pattern=config.get("alpha_pattern") or {},
                bias=config.get("bias") or "none",
                lora_bias=bool(config.get("lora_bias")),
                modules_to_save=present or None,
                adapter_dtype=adapter_dtype,
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path / CONFIG_FILE}: {error}") from error


def load(path: str | os.PathLike[str]) -> LoadedCheckpoint:
    """Reads a LoRA checkpoint.

    Raises CheckpointError for a missing, truncated or corrupt file, a method other than LoRA, a LoRA variant that is
    more than `s·BA` and biases (DoRA, aLoRA, …) or changes the base model (PiSSA, OLoRA, …), a tensor that the config
    does not account for, and tensors that do not belong together.
    """
    folder = files.folder(path)
    config = files.read_config(folder)
    kind = files.checkpoint_format(config)
    if kind != "peft":
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: expected a LoRA checkpoint of HF PEFT, got one in the format of {kind}"
        )
    _check_config(folder / CONFIG_FILE, config)
    tensors = files.read_weights(folder, WEIGHTS_FILE, pickled=_PICKLED)
    where = folder / WEIGHTS_FILE
    parts: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise CheckpointError(f"{where}: expected keys like {_PREFIX}<module>.lora_A.weight, got {key!r}")
        # the name in the model: without wrappers, and without PEFT's default name of the adapter
        name = _NAMED.sub(r"\1\2", files.plain_name(key.removeprefix(_PREFIX)))
        suffix = next((s for s in (_A, _B, _B_BIAS) if name.endswith(s)), None)
        found = rest if suffix is None else parts.setdefault(name.removesuffix(suffix), {})
        if (suffix or name) in found:
            raise CheckpointError(f"{where}: expected one tensor for {name}, got a second one as {key!r}")
        found[suffix or name] = tensor
    if not parts:
        raise CheckpointError(f"{where}: expected LoRA factors, got none")
    biases, saved, base = _other_tensors(where, rest, parts, config)
    adapters = {name: _adapter(where, name, found, config) for name, found in parts.items()}
    for name, tensor in {**biases, **base}.items():
        files.finite_floats(where, name, tensor)
        if name in biases and tensor.dim() != 1:
            raise CheckpointError(f"{where}: {name}: expected a bias of shape [N], got {list(tensor.shape)}")
    about = files.about(config, folder / CONFIG_FILE)
    return LoadedCheckpoint(folder, config, adapters, biases, saved, base, about)


def _other_tensors(
    where: Path, tensors: Mapping[str, Tensor], adapted: Collection[str], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Sorts a checkpoint's other tensors: trained biases, modules that train in full, weights of the base model."""
    biases: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, last = key.rpartition(".")
        inner = module.removesuffix(_BASE)
        name = f"{inner}.{last}" if inner in adapted and last in ("weight", "bias") else key
        if _is_duplicate(key, tensors):
            continue
        if any(within(key, name) for name in config.get("modules_to_save") or ()):
            saved[key] = tensor
        elif _is_bias(key, config.get("bias")):
            biases[name] = tensor
        elif last == "weight" or (last == "bias" and f"{module}.weight" in tensors):
            base[name] = tensor
        elif "lora_embedding_" in key or last == "trainable_tokens_delta":
            raise CheckpointError(f"{where}: expected only adapters of linears, got one of an embedding: {key!r}")
        else:
            raise CheckpointError(f"{where}: expected no tensor that {CONFIG_FILE} does not account for, got {key!r}")
    return biases, saved, base


def _is_duplicate(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is a duplicate that PEFT wrote from inside its wrapper of a module that trains in full.

    Such keys are `<module>.original_module.…` and `<module>.modules_to_save.…`, with or without the adapter's name.
    """
    found = re.search(r"\.(modules_to_save|original_module)\.", key)
    if found is None:
        return False
    module, rest = key[: found.start()], key[found.end() :]
    return any(f"{module}.{name}" in tensors for name in (rest, rest.partition(".")[2]))


def load_factors(path: str | os.PathLike[str]) -> LoadedCheckpoint:
    """Reads a checkpoint with nothing but adapters s·(BAx + b).

    Raises CheckpointError as `load`, and for trained biases and modules trained in full, which a merge cannot include.
    """
    loaded = load(path)
    others = [*loaded.biases, *loaded.saved]
    if others:
        raise CheckpointError(f"{path}: expected only adapters, got other trained tensors: {', '.join(others)}")
    return loaded


def save(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    adapters: Mapping[str, Sequence[Tensor | None]],
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a checkpoint that HF PEFT reads.

    Args:
        config: the config's fields, without peft_type.
        adapters: (A, B) or (A, B, lora_bias) by the linear's name.
        others: the other tensors of a `LoadedCheckpoint`, by their names in the base model.

    A failure leaves an earlier checkpoint as it was.
    """
    weights: dict[str, Tensor] = {}
    for name, factors in adapters.items():
        for suffix, factor in zip((_A, _B, _B_BIAS), factors, strict=False):
            if factor is not None:
                weights[_PREFIX + name + suffix] = factor
    for name, tensor in (others or {}).items():
        module, _, last = name.rpartition(".")
        weights[_PREFIX + (f"{module}{_BASE}.{last}" if module in adapters else name)] = tensor
    files.write(path, {"peft_type": "LORA", **config}, WEIGHTS_FILE, weights)


def scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """s = lora_alpha / r, or lora_alpha / √r for rsLoRA; it has no unit."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def _is_bias(name: str, mode: Any) -> bool:
    return name.endswith(f"{_BASE}.bias") if mode == "lora_only" else mode == "all" and name.endswith(".bias")


def _check_config(file: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: expected peft_type 'LORA', got {config.get('peft_type')!r}")
    r, lora_alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise CheckpointError(f"{file}: expected r to be an integer of 1 or more, got {r!r}")
    if not isinstance(lora_alpha, (int, float)) or isinstance(lora_alpha, bool) or not abs(lora_alpha) <= _LARGEST:
        raise CheckpointError(f"{file}: expected lora_alpha to be a finite number, got {lora_alpha!r}")
    unsupported = {field: value for field, value in config.items() if value and not _is_plain(field, value)}
    if unsupported:
        found = ", ".join(f"{field}={value!r}" for field, value in sorted(unsupported.items()))
        raise CheckpointError(f"{file}: expected a LoRA that is s·BA and nothing more, got {found}")
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        try:
            numbers = [float(value) for key, value in pattern.items() if re.compile(key)]
        except (AttributeError, TypeError, ValueError, OverflowError, re.error) as error:
            raise CheckpointError(f"{file}: expected {field} to map patterns to numbers, got {pattern!r}") from error
        if not all(math.isfinite(number) for number in numbers):
            raise CheckpointError(f"{file}: expected finite numbers in {field}, got {pattern!r}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise CheckpointError(f"{file}: expected modules_to_save to be a list of names, got {saved!r}")


# Fields of the config that may have any value, as they do not change s·BA. Other fields must be empty.
_PLAIN_FIELDS = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_bias"),
    # each layer knows how it stores its weight; PEFT itself changes this flag while it goes through a model
    "fan_in_fan_out",
    *("runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
# Initialisations with which PEFT also changes the base model's weights when it loads the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _is_plain(field: str, value: Any) -> bool:
    if field == "bias":
        return value in BIASES
    if field == "init_lora_weights":
        return not (isinstance(value, str) and value.lower().startswith(_CHANGES_BASE))
    return field in _PLAIN_FIELDS


def _adapter(where: Path, name: str, parts: dict[str, Tensor], config: dict[str, Any]) -> LoadedAdapter:
    wanted = (_A, _B, _B_BIAS) if config.get("lora_bias") else (_A, _B)
    if parts.keys() != set(wanted):
        raise CheckpointError(
            f"{where}: expected {' and '.join(name + s for s in wanted)} according to {CONFIG_FILE}, "
            f"got {' and '.join(name + s for s in sorted(parts))}"
        )
    lora_A, lora_B, lora_bias = parts[_A], parts[_B], parts.get(_B_BIAS)
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1] or lora_A.shape[0] < 1:
        raise CheckpointError(
            f"{where}: {name}: expected lora_A [R, K] and lora_B [N, R], "
            f"got {list(lora_A.shape)} and {list(lora_B.shape)}"
        )
    if lora_bias is not None and lora_bias.shape != lora_B.shape[:1]:
        raise CheckpointError(f"{where}: {name}: expected lora_B.bias [{lora_B.shape[0]}], got {list(lora_bias.shape)}")
    for suffix, tensor in parts.items():
        files.finite_floats(where, name + suffix, tensor)
    rank = pattern_value(config.get("rank_pattern") or {}, name, config["r"])
    if rank != lora_A.shape[0]:
        raise CheckpointError(
            f"{where}: {name}: expected rank {rank} as in {CONFIG_FILE}, got factors of rank {lora_A.shape[0]}"
        )
    lora_alpha = pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    adapter = LoadedAdapter(lora_A, lora_B, float(lora_alpha), bool(config.get("use_rslora")), lora_bias)
    if not abs(adapter.scaling) <= torch.finfo(torch.float32).max:
        raise CheckpointError(
            f"{where.parent / CONFIG_FILE}: {name}: expected a scaling that fp32 can hold, got {adapter.scaling}"
        )
    return adapter


def contents_of(model: nn.Module, loaded: LoadedCheckpoint) -> Contents:
    """What the checkpoint brings to an injected model. Raises CheckpointError if it does not fit."""
    layers = {plain_name(name): layer for name, layer in lora_layers(model)}
    path = loaded.path
    files.same_names(path, "adapters for exactly the model's LoRALinear layers", loaded.adapters, layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        adapter = loaded.adapters[name]
        same_rank(path, name, layer, adapter.lora_A)
        if (adapter.lora_bias is None) != (layer.lora_bias is None):
            has = ("without", "with")
            raise CheckpointError(
                f"{path}: {name}: expected an adapter {has[layer.lora_bias is not None]} lora_bias, "
                f"got one {has[adapter.lora_bias is not None]}"
            )
        tensors |= {f"{name}.lora_A": adapter.lora_A, f"{name}.lora_B": adapter.lora_B}
        if adapter.lora_bias is not None:
            tensors[f"{name}.lora_bias"] = adapter.lora_bias
    saved, biases = _trained_in_place(model)
    trained = {**loaded.biases, **loaded.saved}
    wanted = {*saved, *with_aliases(model, biases, loaded.biases)}
    files.same_names(path, "biases and modules_to_save as the model trains them", trained, wanted)
    alphas = {name: (adapter.lora_alpha, adapter.use_rslora) for name, adapter in loaded.adapters.items()}
    return Contents({**tensors, **trained, **loaded.base}, alphas, Origin(loaded.about, tuple(loaded.base)))


def save_model(model: nn.Module, path: AnyPath) -> None:
    """Saves a model's LoRA adapters and what trains with them. `cannot_hold` says whether the format can hold these."""
    layers = {plain_name(name): layer for name, layer in lora_layers(model)}
    first = next(iter(layers.values()))
    use_rslora, alphas = one_scaling(layers)
    alpha = next(iter(alphas.values()))
    saved, biases = _trained_in_place(model)
    aliases = tied(model, saved)
    about = about_of(model)
    config: dict[str, Any] = {
        "r": first.r,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": use_rslora,
        "target_modules": _target_modules(model),
        "rank_pattern": {f"^{re.escape(n)}": layer.r for n, layer in layers.items() if layer.r != first.r},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "bias": next(iter(_bias_modes(model)), "none"),
        "lora_bias": first.lora_bias is not None,
        "modules_to_save": _modules_to_save(model) or None,
        "ensure_weight_tying": bool(aliases),
        "fan_in_fan_out": False,
        "inference_mode": True,
        **about,
    }
    if about["task_type"] is None:  # PEFT's AutoPeftModel reads this field then
        kind = type(model)
        config["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    save(
        path,
        config,
        {name: (layer.lora_A, layer.lora_B, layer.lora_bias) for name, layer in layers.items()},
        values_of(model, (*biases, *saved, *aliases, *origin_of(model).embeddings)),
    )


def cannot_hold(model: nn.Module, names: Collection[str]) -> str | None:
    """What in a model a LoRA checkpoint of HF PEFT cannot hold, as a text; None if it can hold everything."""
    layers = dict(lora_layers(model))
    other = [type(r.config).__name__ for r in injections(model) if not isinstance(r.config, LoraConfig)]
    saved, biases = _trained_in_place(model)
    factors = {f"{plain_name(name)}.{factor}" for name in layers for factor in ("lora_A", "lora_B", "lora_bias")}
    unknown = [name for name in names if name not in {*factors, *saved, *biases}]
    if not layers or other or unknown:
        return ", ".join(other) or ", ".join(unknown[:3]) or "no LoRALinear"
    if len(_bias_modes(model)) > 1:
        return f"bias {' and '.join(sorted(_bias_modes(model)))} at once"
    if len({layer.lora_bias is None for layer in layers.values()}) > 1:
        return "lora_bias in some layers only"
    if len({layer.lora_dropout for layer in layers.values()}) > 1:
        return "lora_dropout that differs between layers"
    of_embeddings, values = embeddings(model), dict(named_values(model))
    for alias, name in tied(model, saved).items():
        if id(values[alias]) not in of_embeddings:
            return f"{name}, which trains in full and is also {alias}"
    return None


def _bias_modes(model: nn.Module) -> set[str]:
    return {config.bias for config in lora_configs(model)}


def _modules_to_save(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for config in lora_configs(model) for name in config.modules_to_save or ()))


def _trained_in_place(model: nn.Module) -> tuple[list[str], list[str]]:
    """The model's own tensors that train: parameters and buffers of its modules_to_save, and other biases."""
    saved = saved_names(model, _modules_to_save(model))
    trained = [r.trained for r in injections(model) if isinstance(r.config, LoraConfig)]
    return saved, [name for names in trained for name in map(plain_name, names) if name not in saved]


def _target_modules(model: nn.Module) -> list[str] | str:
    """The layers' names for a PEFT config; a regular expression if the names would match other modules too."""
    layers = sorted(plain_name(name) for name, _ in every_lora_layer(model))
    others = {plain_name(name) for name, _ in model.named_modules(remove_duplicate=False)} - {*layers}
    if any(other.endswith(f".{name}") for other in others for name in layers):
        return "|".join(re.escape(name) for name in layers)
    return layers
