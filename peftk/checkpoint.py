"""The adapters of a model, to and from files: HF PEFT's format, AdapterHub's, and peftk's own for everything else."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftk.interop import adapterhub_checkpoint, files, own_checkpoint, peft_checkpoint
from peftk.interop.adapterhub_checkpoint import LoadedBottlenecks
from peftk.interop.files import CheckpointError
from peftk.methods.adapterhub import AdapterHubConfig, as_adapterhub
from peftk.methods.lora import LoraConfig
from peftk.methods.plan import Config, adapter_parameters, carrying_out, injections
from peftk.methods.targets import inside, pattern_value
from peftk.model import lora_layers
from peftk.nn import LoRALinear
from peftk.nn.replace import is_linear

Path = str | os.PathLike[str]


class _Contents(NamedTuple):
    """What a checkpoint brings to a model: tensors by the model's names for them; lora_alpha, use_rslora by layer."""

    tensors: Mapping[str, Tensor]
    alphas: Mapping[str, tuple[float, bool]]


def save_adapter(model: nn.Module, path: Path, *, format: str | None = None) -> None:
    """Writes what `inject` put into a model, and what trains of the model itself, into a folder.

    format: "peft" (LoRA; HF PEFT and `MultiAdapter.load` read it), "peftk" (any methods, several at once), None for the
    first of these that can hold it, or "adapterhub" (bottleneck adapters; the adapters library reads it).

    Raises ValueError where the model holds no adapter or the format cannot hold what it holds. A failure leaves an
    earlier checkpoint as it was.
    """
    if format is not None and format not in files.FORMATS:
        raise ValueError(f"format: expected one of {', '.join(files.FORMATS)} or None, got {format!r}")
    names = trained_names(model)
    if not names:
        raise ValueError("model: expected LoRALinear layers or other adapters (peftk.inject puts them in), got none")
    if format == "adapterhub":
        _save_adapterhub(model, path)
        return
    reason = _beyond_peft(model, names)
    if format == "peft" and reason is not None:
        raise ValueError(f"format: expected what a LoRA checkpoint of HF PEFT can hold, got {reason}")
    if format == "peft" or (format is None and reason is None):
        _save_peft(model, path)
    else:
        parameters = dict(model.named_parameters())
        configs = [_as_it_is(model, record.config, record.layers) for record in injections(model)]
        own_checkpoint.save(path, configs, {name: parameters[name] for name in names})


def load_adapter(model: nn.Module, path: Path) -> None:
    """Loads a checkpoint of HF PEFT (LoRA), AdapterHub (bottleneck adapters) or peftk into a model.

    A model without adapters is injected first, by the checkpoint's config. One with adapters must hold and train
    exactly what the checkpoint brings; its LoRA layers take lora_alpha and use_rslora over, too.

    Raises CheckpointError for a checkpoint that is damaged, unsupported, or does not fit the model, ValueError where a
    layer is merged; the model is as it was then, without adapters if it had none.
    """
    folder = files.folder(path)
    kind = files.checkpoint_format(files.read_config(folder))
    for name, layer in lora_layers(model):
        if layer.merged:
            raise ValueError(f"model: expected {name} to be unmerged before its adapter changes, got a merged layer")
    if kind == "peft":
        loaded = peft_checkpoint.load(folder)
        with _injected(model, [loaded.lora_config()], path):
            _fill(model, _of_peft(model, loaded), path)
    elif kind == "adapterhub":
        bottlenecks = adapterhub_checkpoint.load(folder)
        with _injected(model, [bottlenecks.config], path):
            _fill(model, _of_adapterhub(model, bottlenecks), path)
    else:
        configs, tensors = own_checkpoint.load(folder)
        with _injected(model, configs, path):
            _fill(model, _of_peftk(model, configs, tensors, path), path)


def trained_names(model: nn.Module) -> list[str]:
    """Every Parameter that a method trains, its own and the model's, by name, each once."""
    names = [name for record in injections(model) for name in record.trained]
    for path, module in model.named_modules():
        names += [f"{path}.{name}".removeprefix(".") for name in adapter_parameters(module)]
    once = {name for name, _ in model.named_parameters()}  # where a Parameter that has several names has one
    return [name for name in dict.fromkeys(names) if name in once]


@contextlib.contextmanager
def _injected(model: nn.Module, configs: Sequence[Config], path: Path) -> Any:
    """The model with the adapters of these configs, if it has none; what fails within takes them out again."""
    if trained_names(model):
        yield
        return
    with contextlib.ExitStack() as undo:
        try:
            undo.enter_context(carrying_out(model, configs))
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: expected a checkpoint that fits the model: {error}") from error
        yield


def _fill(model: nn.Module, contents: _Contents, path: Path) -> None:
    """Copies a checkpoint's contents into the model: all of them or, where one fails, none."""
    state = model.state_dict(keep_vars=True)
    places: list[tuple[Tensor, Tensor, Tensor]] = []  # where to, what, and what is there
    for name, value in contents.tensors.items():
        place = state[name].detach()
        if value.shape != place.shape or value.is_floating_point() != place.is_floating_point():
            raise CheckpointError(
                f"{path}: {name}: expected {place.dtype} {list(place.shape)}, got {value.dtype} {list(value.shape)}"
            )
        converted = value.to(place.device, place.dtype)
        if not bool(converted.isfinite().all()):
            raise CheckpointError(f"{path}: {name}: expected values that {place.dtype} holds, got larger ones")
        places.append((place, converted, place.clone()))
    with torch.no_grad():
        try:
            for place, value, _ in places:
                place.copy_(value)
        except BaseException:
            for place, _, before in places:
                place.copy_(before)
            raise
    for name, layer in lora_layers(model):
        if name in contents.alphas:
            layer.lora_alpha, layer.use_rslora = contents.alphas[name]


def _same(path: Path, what: str, found: Collection[str], wanted: Collection[str]) -> None:
    """Raises CheckpointError unless a checkpoint brings exactly what the model has."""
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        raise CheckpointError(
            f"{path}: expected {what}; missing there: {missing[:8]}{'…' * (len(missing) > 8)}, "
            f"unknown here: {unknown[:8]}{'…' * (len(unknown) > 8)}"
        )


# HF PEFT's format


def _of_peft(model: nn.Module, loaded: peft_checkpoint.LoadedCheckpoint) -> _Contents:
    layers = dict(lora_layers(model))
    _same(loaded.path, "adapters for exactly the model's LoRALinear layers", loaded.adapters, layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        adapter = loaded.adapters[name]
        if adapter.lora_A.shape != layer.lora_A.shape or adapter.lora_B.shape != layer.lora_B.shape:
            raise CheckpointError(
                f"{loaded.path}: {name}: expected factors {list(layer.lora_A.shape)} and {list(layer.lora_B.shape)}, "
                f"got {list(adapter.lora_A.shape)} and {list(adapter.lora_B.shape)}"
            )
        if (adapter.lora_bias is None) != (layer.lora_bias is None):
            has = ("without", "with")
            raise CheckpointError(
                f"{loaded.path}: {name}: expected an adapter {has[layer.lora_bias is not None]} lora_bias, "
                f"got one {has[adapter.lora_bias is not None]}"
            )
        tensors |= {f"{name}.lora_A": adapter.lora_A, f"{name}.lora_B": adapter.lora_B}
        if adapter.lora_bias is not None:
            tensors[f"{name}.lora_bias"] = adapter.lora_bias
    saved, biases = _trained_in_place(model)
    tied = _tied(model, saved)
    if tied is not None:
        raise CheckpointError(f"{loaded.path}: expected modules_to_save that share no weight with others, got {tied}")
    _same(
        loaded.path,
        "biases and modules_to_save as the model trains them",
        {**loaded.biases, **loaded.saved},
        {*saved, *biases},
    )
    alphas = {name: (adapter.lora_alpha, adapter.use_rslora) for name, adapter in loaded.adapters.items()}
    return _Contents({**tensors, **loaded.biases, **loaded.saved}, alphas)


def _save_peft(model: nn.Module, path: Path) -> None:
    layers = dict(lora_layers(model))
    first = next(iter(layers.values()))
    use_rslora, alphas = _scalings(layers)
    alpha = next(iter(alphas.values()))
    saved, biases = _trained_in_place(model)
    state = model.state_dict()
    config: dict[str, Any] = {
        "r": first.r,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": use_rslora,
        "target_modules": _target_modules(model, layers),
        "rank_pattern": {f"^{re.escape(n)}": layer.r for n, layer in layers.items() if layer.r != first.r},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "bias": next(iter(_bias_modes(model)), "none"),
        "lora_bias": first.lora_bias is not None,
        "modules_to_save": _modules_to_save(model) or None,
        "fan_in_fan_out": False,
        "task_type": None,
        "inference_mode": True,
    }
    peft_checkpoint.save(
        path,
        config,
        {name: (layer.lora_A, layer.lora_B, layer.lora_bias) for name, layer in layers.items()},
        {name: state[name] for name in biases},
        {name: state[name] for name in saved},
    )


def _beyond_peft(model: nn.Module, names: Collection[str]) -> str | None:
    """What of a model a LoRA checkpoint of HF PEFT cannot hold, in words; None where it can."""
    layers = dict(lora_layers(model))
    other = [type(r.config).__name__ for r in injections(model) if not isinstance(r.config, LoraConfig)]
    saved, biases = _trained_in_place(model)
    own = {f"{name}.{factor}" for name in layers for factor in ("lora_A", "lora_B", "lora_bias")}
    strange = [name for name in names if name not in own and name not in saved and name not in biases]
    if not layers or other or strange:
        return ", ".join(other) or ", ".join(strange[:3]) or "no LoRALinear"
    if len(_bias_modes(model)) > 1:
        return f"bias {' and '.join(sorted(_bias_modes(model)))} at once"
    if len({layer.lora_bias is None for layer in layers.values()}) > 1:
        return "lora_bias in some layers only"
    return _tied(model, saved)


def _lora_configs(model: nn.Module) -> list[LoraConfig]:
    return [record.config for record in injections(model) if isinstance(record.config, LoraConfig)]


def _bias_modes(model: nn.Module) -> set[str]:
    return {config.bias for config in _lora_configs(model)}


def _modules_to_save(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for config in _lora_configs(model) for name in config.modules_to_save or ()))


def _trained_in_place(model: nn.Module) -> tuple[list[str], list[str]]:
    """Of the model's own: the parameters and buffers of its modules_to_save, and the biases that train besides."""
    modules = _modules_to_save(model)
    saved = [n for n in model.state_dict() if any(inside(n.rpartition(".")[0], module) for module in modules)]
    lora = (r for r in injections(model) if isinstance(r.config, LoraConfig))
    return saved, [name for record in lora for name in record.trained if name not in set(saved)]


def _tied(model: nn.Module, saved: Collection[str]) -> str | None:
    """A parameter that trains whole and is also another module's. PEFT trains a copy of it, peftk itself."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole = {id(parameters[name]): name for name in saved if name in parameters}
    for name, parameter in parameters.items():
        if id(parameter) in whole and name not in saved:
            return f"{whole[id(parameter)]}, which is {name} too"
    return None


def _scalings(layers: Mapping[str, LoRALinear]) -> tuple[bool, dict[str, float]]:
    """One use_rslora for all layers, and the lora_alpha that gives each its scaling with it."""
    flags = {layer.use_rslora for layer in layers.values()}
    if len(flags) == 1:
        return flags.pop(), {name: layer.lora_alpha for name, layer in layers.items()}
    return False, {name: layer.scaling * layer.r for name, layer in layers.items()}


def _target_modules(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str] | str:
    """The layers' names for a PEFT config; a regular expression where a name alone would match other modules too."""
    others = [n for n, m in model.named_modules() if is_linear(m) and n not in layers]
    if any(other.endswith(f".{name}") for other in others for name in layers):
        return "|".join(re.escape(name) for name in sorted(layers))
    return sorted(layers)


# AdapterHub's format


def _of_adapterhub(model: nn.Module, loaded: LoadedBottlenecks) -> _Contents:
    try:
        ours, modules = _adapterhub(model)
    except ValueError as error:
        raise CheckpointError(f"{loaded.path}: expected a model with bottleneck adapters alone: {error}") from error
    for field in ("placement", "activation", "scaling"):
        theirs, held = getattr(loaded.config, field), getattr(ours, field)
        if theirs != held:
            raise CheckpointError(f"{loaded.path}: expected the model's {field}, {held!r}, got {theirs!r}")
    # a checkpoint of a model with a head fits its base model, and the other way round
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {key.removeprefix(prefix): module for key, module in modules.items()}
    adapters = {key.removeprefix(prefix): parts for key, parts in loaded.adapters.items()}
    _same(loaded.path, "adapters in exactly the model's places", adapters, modules)
    tensors = {f"{modules[key]}.{part}": tensor for key, parts in adapters.items() for part, tensor in parts.items()}
    return _Contents(tensors, {})


def _save_adapterhub(model: nn.Module, path: Path) -> None:
    try:
        config, modules = _adapterhub(model)
    except ValueError as error:
        raise ValueError(f"format: expected what a checkpoint of AdapterHub can hold: {error}") from error
    adapters = {key: dict(model.get_submodule(module).named_parameters()) for key, module in modules.items()}
    about = {
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "model_class": type(model).__name__,
        "hidden_size": next(iter(adapters.values()))["lora_A"].shape[1],
    }
    adapterhub_checkpoint.save(path, config, adapters, about)


def _adapterhub(model: nn.Module) -> tuple[AdapterHubConfig, dict[str, str]]:
    """The model's one method as AdapterHub says it. Raises ValueError where it cannot, or there are several."""
    records = injections(model)
    if len(records) != 1:
        raise ValueError(
            f"model: expected one method, got {', '.join(type(r.config).__name__ for r in records) or 'none'}"
        )
    return as_adapterhub(model, records[0].config)


# peftk's own format


def _of_peftk(model: nn.Module, configs: Sequence[Config], tensors: Mapping[str, Tensor], path: Path) -> _Contents:
    records = injections(model)
    given, held = ([type(one).__name__ for one in some] for some in (configs, [r.config for r in records]))
    if given != held:
        raise CheckpointError(f"{path}: expected the model's methods, {', '.join(held)}, got {', '.join(given)}")
    alphas = {}
    for config, record in zip(configs, records, strict=True):
        if isinstance(config, LoraConfig):
            for name in record.layers:
                alphas[name] = (float(pattern_value(config.alpha_pattern, name, config.lora_alpha)), config.use_rslora)
        elif own_checkpoint.fields_of(config) != own_checkpoint.fields_of(record.config):
            raise CheckpointError(f"{path}: expected the model's {record.config!r}, got {config!r}")
    _same(path, "tensors for exactly what the model trains", tensors, trained_names(model))
    return _Contents(tensors, alphas)


def _as_it_is(model: nn.Module, config: Config, names: Sequence[str]) -> Config:
    """The config that says what the layers are now: a checkpoint may have brought other scalings since `inject`."""
    if not isinstance(config, LoraConfig):
        return config
    layers = {name: layer for name, layer in lora_layers(model) if name in names}
    use_rslora, alphas = _scalings(layers)
    if use_rslora == config.use_rslora and all(
        alpha == pattern_value(config.alpha_pattern, name, config.lora_alpha) for name, alpha in alphas.items()
    ):
        return config
    pattern = {f"^{re.escape(name)}": alpha for name, alpha in alphas.items()}
    return dataclasses.replace(config, use_rslora=use_rslora, alpha_pattern=pattern)
