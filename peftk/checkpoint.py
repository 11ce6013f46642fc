"""The adapters of a model, to and from files: HF PEFT's format, AdapterHub's, and peftk's own for everything else."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftk import checks, interrupts
from peftk.interop import adapterhub_checkpoint, files, fitting, own_checkpoint, peft_checkpoint
from peftk.interop.adapterhub_checkpoint import LoadedBottlenecks
from peftk.interop.files import CheckpointError, plain_name
from peftk.interop.own_checkpoint import OwnCheckpoint
from peftk.methods.adapterhub import AdapterHubConfig, as_adapterhub
from peftk.methods.lora import LoraConfig
from peftk.methods.plan import Config, Injection, adapter_parameters, carrying_out, injections, unwrapped, without_peft
from peftk.methods.targets import pattern_value
from peftk.methods.trial import looking
from peftk.model import lora_layers
from peftk.nn import LoRALinear

Path = str | os.PathLike[str]


class _Contents(NamedTuple):
    """What a checkpoint brings to a model: tensors by the model's names for them; lora_alpha, use_rslora by layer."""

    tensors: Mapping[str, Tensor]
    alphas: Mapping[str, tuple[float, bool]]
    origin: _Origin


class _Origin(NamedTuple):
    """What a model remembers of the checkpoints that it loaded, for those that will be saved.

    about: what the last one said of the base model (`files.ABOUT`). embeddings: names of the base model's own weights
    that they brought.
    """

    about: Mapping[str, str] = {}
    embeddings: tuple[str, ...] = ()


_ORIGIN = "_peftk_origin"


def save_adapter(model: nn.Module, path: Path, *, format: str | None = None) -> None:
    """Writes what `inject` put into a model, and what trains of the model itself, into a folder.

    format: "peft" (LoRA; HF PEFT and `MultiAdapter.load` read it), "peftk" (any methods, several at once), None for the
    first of these that can hold it, or "adapterhub" (bottleneck adapters; the adapters library reads it).

    The config names the base model, its revision and the task as the checkpoint that was loaded did; else it has the
    model's `name_or_path`. While layers are merged, A and B are written as they are, and no merged weight.

    Raises ValueError where the model holds no adapter or the format cannot hold what it holds. A failure leaves an
    earlier checkpoint as it was.
    """
    if format is not None and format not in files.FORMATS:
        raise ValueError(f"format: expected one of {', '.join(files.FORMATS)} or None, got {format!r}")
    model = _checked(model)
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
        _save_peftk(model, path, names)


def load_adapter(model: nn.Module, path: Path) -> None:
    """Loads a checkpoint of HF PEFT (LoRA), AdapterHub (bottleneck adapters) or peftk into a model.

    A model without adapters is injected first, by the checkpoint's config. One with adapters must hold and train
    exactly what the checkpoint brings, with the same ranks; its LoRA layers take lora_alpha and use_rslora over, too.
    Embeddings that PEFT saved because their size had changed go into the model, as in PEFT.

    Raises CheckpointError for a checkpoint that is damaged, unsupported, or does not fit the model, ValueError where a
    layer is merged or HF PEFT's adapters are in the model; it is as it was then, without adapters if it had none.
    """
    model = _checked(model)
    folder = files.folder(path)
    without_peft(model)
    kind = files.checkpoint_format(files.read_config(folder))
    for name, layer in lora_layers(model):
        if layer.merged:
            raise ValueError(f"model: expected {name} to be unmerged before its adapter changes, got a merged layer")
    if kind == "peft":
        loaded = peft_checkpoint.load(folder)
        with looking(model):
            fitting.check(fitting.without_layers(model, dict(_every_lora_layer(model))), loaded)
            with _injected(model, [loaded.lora_config()], path):
                _fill(model, _of_peft(model, loaded), path)
    elif kind == "adapterhub":
        bottlenecks = adapterhub_checkpoint.load(folder)
        with _injected(model, [bottlenecks.config], path):
            _fill(model, _of_adapterhub(model, bottlenecks), path)
    else:
        own = own_checkpoint.load(folder)
        with _injected(model, own.configs, path):
            _fill(model, _of_peftk(model, own, path), path)


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return unwrapped(model)


def trained_names(model: nn.Module) -> list[str]:
    """Every Parameter that a method trains, its own and the model's, by name, each once."""
    names = [name for record in injections(model) for name in record.trained]
    for path, module in model.named_modules():
        names += [f"{path}.{name}".removeprefix(".") for name in adapter_parameters(module)]
    once = {plain_name(name) for name, _ in model.named_parameters()}  # where one that has several names has one
    return [name for name in dict.fromkeys(map(plain_name, names)) if name in once]


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
    state = dict(fitting.named_values(model))
    places: list[tuple[Tensor, Tensor, Tensor]] = []  # where to, what, and what is there
    for name, value in contents.tensors.items():
        checks.dense(name, state[name])
        checks.writable(name, state[name])
        place = state[name].detach()
        if isinstance(state[name], nn.Parameter):
            files.finite(path, name, value)
        places.append((place, fitting.fitted(path, name, value, place).to(place.device), place.clone()))
    origin = _origin(model)
    embeddings = dict.fromkeys((*origin.embeddings, *contents.origin.embeddings))
    with torch.no_grad(), interrupts.held():
        try:
            for place, value, _ in places:
                place.copy_(value)
        except BaseException:
            for place, _, before in places:
                place.copy_(before)
            raise
        for name, layer in lora_layers(model):
            if plain_name(name) in contents.alphas:
                layer.lora_alpha, layer.use_rslora = contents.alphas[plain_name(name)]
        model.__dict__[_ORIGIN] = _Origin(contents.origin.about, tuple(embeddings))


def _origin(model: nn.Module) -> _Origin:
    found: _Origin = model.__dict__.get(_ORIGIN, _Origin())
    return found


def _about(model: nn.Module) -> dict[str, str | None]:
    """What a config says of the base model: as the loaded checkpoint's did, else the model's name alone."""
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    fields = {**dict.fromkeys(files.ABOUT), "base_model_name_or_path": name if isinstance(name, str) and name else None}
    return {**fields, **_origin(model).about}


def _values(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the model's Parameters and buffers, as they are where nothing is merged."""
    values = dict(fitting.named_values(model))
    merged = {
        id(getattr(layer, part)): (layer, part)
        for _, layer in lora_layers(model)
        if layer.merged
        for part in ("weight", "bias")
    }
    found = {}
    for name in names:
        if name in values:
            layer, part = merged.get(id(values[name]), (None, ""))
            found[name] = values[name] if layer is None else layer.base(part)
    return found


# HF PEFT's format


def _of_peft(model: nn.Module, loaded: peft_checkpoint.LoadedCheckpoint) -> _Contents:
    layers = {plain_name(name): layer for name, layer in lora_layers(model)}
    path = loaded.path
    files.same_names(path, "adapters for exactly the model's LoRALinear layers", loaded.adapters, layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        adapter = loaded.adapters[name]
        _same_rank(path, name, layer, adapter.lora_A)
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
    wanted = {*saved, *fitting.with_aliases(model, biases, loaded)}
    files.same_names(path, "biases and modules_to_save as the model trains them", trained, wanted)
    alphas = {name: (adapter.lora_alpha, adapter.use_rslora) for name, adapter in loaded.adapters.items()}
    return _Contents({**tensors, **trained, **loaded.base}, alphas, _Origin(loaded.about, tuple(loaded.base)))


def _same_rank(path: Path, name: str, layer: LoRALinear, lora_A: Tensor) -> None:
    rank = lora_A.shape[0] if lora_A.dim() else 0
    if rank != layer.r:
        raise CheckpointError(
            f"{path}: {name}: expected rank {layer.r}, that of the adapter in the model, got {rank}; "
            "load it into a model without adapters, or merge it with peftk.switch_adapter"
        )


def _save_peft(model: nn.Module, path: Path) -> None:
    layers = {plain_name(name): layer for name, layer in lora_layers(model)}
    first = next(iter(layers.values()))
    use_rslora, alphas = _scalings(layers)
    alpha = next(iter(alphas.values()))
    saved, biases = _trained_in_place(model)
    tied = fitting.tied(model, saved)
    about = _about(model)
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
        "ensure_weight_tying": bool(tied),
        "fan_in_fan_out": False,
        "inference_mode": True,
        **about,
    }
    if about["task_type"] is None:  # what PEFT's AutoPeftModel goes by then
        kind = type(model)
        config["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    peft_checkpoint.save(
        path,
        config,
        {name: (layer.lora_A, layer.lora_B, layer.lora_bias) for name, layer in layers.items()},
        _values(model, (*biases, *saved, *tied, *_origin(model).embeddings)),
    )


def _beyond_peft(model: nn.Module, names: Collection[str]) -> str | None:
    """What of a model a LoRA checkpoint of HF PEFT cannot hold, in words; None where it can."""
    layers = dict(lora_layers(model))
    other = [type(r.config).__name__ for r in injections(model) if not isinstance(r.config, LoraConfig)]
    saved, biases = _trained_in_place(model)
    own = {f"{plain_name(name)}.{factor}" for name in layers for factor in ("lora_A", "lora_B", "lora_bias")}
    strange = [name for name in names if name not in {*own, *saved, *biases}]
    if not layers or other or strange:
        return ", ".join(other) or ", ".join(strange[:3]) or "no LoRALinear"
    if len(_bias_modes(model)) > 1:
        return f"bias {' and '.join(sorted(_bias_modes(model)))} at once"
    if len({layer.lora_bias is None for layer in layers.values()}) > 1:
        return "lora_bias in some layers only"
    if len({layer.lora_dropout for layer in layers.values()}) > 1:
        return "lora_dropout that differs between layers"
    of_embeddings, values = fitting.embeddings(model), dict(fitting.named_values(model))
    for alias, name in fitting.tied(model, saved).items():
        if id(values[alias]) not in of_embeddings:
            return f"{name}, which trains whole and is {alias} too"
    return None


def _lora_configs(model: nn.Module) -> list[LoraConfig]:
    return [record.config for record in injections(model) if isinstance(record.config, LoraConfig)]


def _bias_modes(model: nn.Module) -> set[str]:
    return {config.bias for config in _lora_configs(model)}


def _modules_to_save(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for config in _lora_configs(model) for name in config.modules_to_save or ()))


def _trained_in_place(model: nn.Module) -> tuple[list[str], list[str]]:
    """Of the model's own: the parameters and buffers of its modules_to_save, and the biases that train besides."""
    saved = fitting.saved_names(model, _modules_to_save(model))
    trained = [r.trained for r in injections(model) if isinstance(r.config, LoraConfig)]
    return saved, [name for names in trained for name in map(plain_name, names) if name not in saved]


def _scalings(layers: Mapping[str, LoRALinear]) -> tuple[bool, dict[str, float]]:
    """One use_rslora for all layers, and the lora_alpha that gives each its scaling with it."""
    flags = {layer.use_rslora for layer in layers.values()}
    if len(flags) == 1:
        return flags.pop(), {name: layer.lora_alpha for name, layer in layers.items()}
    return False, {name: layer.scaling * layer.r for name, layer in layers.items()}


def _every_lora_layer(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The model's LoRALinear layers, by each of their names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALinear):
            yield name, module


def _target_modules(model: nn.Module) -> list[str] | str:
    """The layers' names for a PEFT config; a regular expression where a name alone would match other modules too."""
    layers = sorted(plain_name(name) for name, _ in _every_lora_layer(model))
    others = {plain_name(name) for name, _ in model.named_modules(remove_duplicate=False)} - {*layers}
    if any(other.endswith(f".{name}") for other in others for name in layers):
        return "|".join(re.escape(name) for name in layers)
    return layers


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
    files.same_names(loaded.path, "adapters in exactly the model's places", adapters, modules)
    tensors = {f"{modules[key]}.{part}": tensor for key, parts in adapters.items() for part, tensor in parts.items()}
    return _Contents(tensors, {}, _Origin(loaded.about))


def _save_adapterhub(model: nn.Module, path: Path) -> None:
    try:
        config, modules = _adapterhub(model)
    except ValueError as error:
        raise ValueError(f"format: expected what a checkpoint of AdapterHub can hold: {error}") from error
    adapters = {key: dict(model.get_submodule(module).named_parameters()) for key, module in modules.items()}
    about = {
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "model_class": type(model).__name__,
        "model_name": _about(model)["base_model_name_or_path"] or "",
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


def _of_peftk(model: nn.Module, own: OwnCheckpoint, path: Path) -> _Contents:
    records = injections(model)
    given, held = ([type(one).__name__ for one in some] for some in (own.configs, [r.config for r in records]))
    if given != held:
        names = [", ".join(some) or "none" for some in (held, given)]
        raise CheckpointError(f"{path}: expected the model's methods, {names[0]}, got {names[1]}")
    wanted = {*trained_names(model), *_buffers(model), *own.embeddings}
    files.same_names(path, "tensors for exactly what the model trains", own.tensors, wanted)
    layers = {plain_name(name): layer for name, layer in lora_layers(model)}
    alphas = {}
    for config, record in zip(own.configs, records, strict=True):
        if isinstance(config, LoraConfig):
            for name in filter(layers.__contains__, map(plain_name, record.layers)):
                rank, lora_A = pattern_value(config.rank_pattern, name, config.r), own.tensors[f"{name}.lora_A"]
                if lora_A.shape[:1] != (rank,):
                    raise CheckpointError(
                        f"{path}: {name}: expected rank {rank} of {files.CONFIG_FILE}, got lora_A {list(lora_A.shape)}"
                    )
                _same_rank(path, name, layers[name], lora_A)
                alphas[name] = (float(pattern_value(config.alpha_pattern, name, config.lora_alpha)), config.use_rslora)
        elif _says(config) != _says(record.config):
            raise CheckpointError(f"{path}: expected the model's {record.config!r}, got {config!r}")
    by_hand = layers.keys() - alphas.keys()
    files.same_names(path, "scalings of the LoRALinear layers that no method put in", own.scalings, by_hand)
    of_embeddings, values = fitting.embeddings(model), dict(fitting.named_values(model))
    for name in own.embeddings:
        if name not in values or id(values[name]) not in of_embeddings:
            raise CheckpointError(f"{path}: expected embeddings of the model's, got {name}")
    return _Contents(own.tensors, {**alphas, **own.scalings}, _Origin(own.about, tuple(own.embeddings)))


def _save_peftk(model: nn.Module, path: Path, names: Collection[str]) -> None:
    tensors, brought = _values(model, (*names, *_buffers(model))), _values(model, _origin(model).embeddings)
    records = injections(model)
    placed = {plain_name(name) for record in records for name in record.layers}
    by_hand = {plain_name(n): layer for n, layer in lora_layers(model) if plain_name(n) not in placed}
    own = OwnCheckpoint(
        configs=[_as_it_is(model, record) for record in records],
        tensors={**brought, **tensors},
        scalings={name: (layer.lora_alpha, layer.use_rslora) for name, layer in by_hand.items()},
        embeddings=[name for name in brought if name not in tensors],
        about={field: value for field, value in _about(model).items() if value is not None},
    )
    own_checkpoint.save(path, own)


def _buffers(model: nn.Module) -> list[str]:
    """The persistent buffers of modules that train whole, which a BatchNorm, say, changes while it trains."""
    held = model.state_dict().keys()
    trained = {plain_name(name) for record in injections(model) for name in record.trained}
    frozen = [name.split(".") for name, _ in model.named_parameters() if plain_name(name) not in trained]
    mixed = {".".join(parts[:depth]) for parts in frozen for depth in range(len(parts))}
    whole = [n for n, m in model.named_modules() if n not in mixed and any(True for _ in m.parameters())]
    within = tuple(f"{name}." if name else "" for name in whole)
    return [plain_name(name) for name, _ in model.named_buffers() if name in held and name.startswith(within)]


def _says(config: Config) -> dict[str, Any]:
    """What two configs must have in common; each layer knows its own dtype."""
    return {name: value for name, value in own_checkpoint.fields_of(config).items() if name != "adapter_dtype"}


def _as_it_is(model: nn.Module, record: Injection) -> Config:
    """The config that says what the adapters are now: they may have got other ranks, scalings, dtypes."""
    config: Any = record.config
    now: dict[str, Any] = {}
    places = {plain_name(name) for name in (*record.layers, *record.attached)}
    modules = [part for n, m in model.named_modules() if plain_name(n) in places for part in m.modules()]
    dtypes = {parameter.dtype for module in modules for parameter in adapter_parameters(module).values()}
    if getattr(config, "adapter_dtype", None) is not None and len(dtypes) == 1:
        now["adapter_dtype"] = dtypes.pop()
    layers = {plain_name(name): layer for name, layer in lora_layers(model) if plain_name(name) in places}
    if isinstance(config, LoraConfig) and layers:
        now["use_rslora"], alphas = _scalings(layers)
        ranks = {name: layer.r for name, layer in layers.items()}
        if any(rank != pattern_value(config.rank_pattern, name, config.r) for name, rank in ranks.items()):
            now["rank_pattern"] = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
        if any(alpha != pattern_value(config.alpha_pattern, name, config.lora_alpha) for name, alpha in alphas.items()):
            now["alpha_pattern"] = {f"^{re.escape(name)}": alpha for name, alpha in alphas.items()}
        dropouts = {layer.lora_dropout for layer in layers.values()}
        if len(dropouts) == 1:
            now["lora_dropout"] = dropouts.pop()
    return dataclasses.replace(config, **now) if now else config
