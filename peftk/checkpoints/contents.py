"""What a checkpoint brings to a model, and what a model has to save, for all formats."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from peftk.checkpoints import files
from peftk.checkpoints.files import CheckpointError, plain_name
from peftk.methods.inject import lora_layers
from peftk.methods.lora import LoraConfig
from peftk.methods.plan import adapter_parameters, injections
from peftk.methods.targets import inside
from peftk.nn.lora_linear import LoRALinear

AnyPath = str | os.PathLike[str]


class Contents(NamedTuple):
    """What a checkpoint brings to a model: tensors by the model's names, and (lora_alpha, use_rslora) by layer."""

    tensors: Mapping[str, Tensor]
    alphas: Mapping[str, tuple[float, bool]]
    origin: Origin


def trained_names(model: nn.Module) -> list[str]:
    """The names of all Parameters that methods train, the methods' own and the model's, each once."""
    names = [name for record in injections(model) for name in record.trained]
    for path, module in model.named_modules():
        names += [f"{path}.{name}".removeprefix(".") for name in adapter_parameters(module)]
    first_names = {plain_name(name) for name, _ in model.named_parameters()}  # one name for each Parameter
    return [name for name in dict.fromkeys(map(plain_name, names)) if name in first_names]


def lora_configs(model: nn.Module) -> list[LoraConfig]:
    return [record.config for record in injections(model) if isinstance(record.config, LoraConfig)]


def one_scaling(layers: Mapping[str, LoRALinear]) -> tuple[bool, dict[str, float]]:
    """One use_rslora for all layers, and for each layer the lora_alpha that gives its scaling."""
    flags = {layer.use_rslora for layer in layers.values()}
    if len(flags) == 1:
        return flags.pop(), {name: layer.lora_alpha for name, layer in layers.items()}
    return False, {name: layer.scaling * layer.r for name, layer in layers.items()}


class Origin(NamedTuple):
    """What a model remembers about the checkpoints that it loaded, for later saves.

    about: the last checkpoint's fields about the base model (`files.ABOUT`). embeddings: names of the base model's own
    weights that the checkpoints brought.
    """

    about: Mapping[str, str] = {}
    embeddings: tuple[str, ...] = ()


_ORIGIN = "_peftk_origin"


def origin_of(model: nn.Module) -> Origin:
    found: Origin = model.__dict__.get(_ORIGIN, Origin())
    return found


def about_of(model: nn.Module) -> dict[str, str | None]:
    """A config's fields about the base model: those of the loaded checkpoint, else only the model's name."""
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    fields = {**dict.fromkeys(files.ABOUT), "base_model_name_or_path": name if isinstance(name, str) and name else None}
    return {**fields, **origin_of(model).about}


def values_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The model's Parameters and buffers of these names, with unmerged values."""
    values = dict(named_values(model))
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


def same_rank(path: AnyPath, name: str, layer: LoRALinear, lora_A: Tensor) -> None:
    """Raises CheckpointError if lora_A does not have the layer's rank."""
    rank = lora_A.shape[0] if lora_A.dim() else 0
    if rank != layer.r:
        raise CheckpointError(
            f"{path}: {name}: expected rank {layer.r} like the adapter in the model, got {rank}; "
            "load it into a model without adapters, or merge it with peftk.switch_adapter"
        )


def every_lora_layer(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The model's LoRALinear layers, under each of their names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALinear):
            yield name, module


def named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every Parameter and buffer of a model, under each of its names, without the parts that wrappers insert."""
    for found in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in found:
            yield plain_name(name), tensor


def tied(model: nn.Module, saved: Collection[str]) -> dict[str, str]:
    """Other names of the Parameters in `saved`, with their names there. (Of these, PEFT trains a copy.)"""
    names: dict[int, str] = {}
    parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name in saved:
        if name in parameters:
            names.setdefault(id(parameters[name]), name)
    return {name: names[id(p)] for name, p in parameters.items() if id(p) in names and name not in saved}


def with_aliases(model: nn.Module, trained: Iterable[str], biases: Collection[str]) -> set[str]:
    """These names, and further names of shared biases if the checkpoint has those in `biases` too."""
    names = set(trained)
    return names | (tied(model, names).keys() & set(biases))


def saved_names(model: nn.Module, modules_to_save: Collection[str] | None) -> list[str]:
    """The names of the Parameters and persistent buffers of these modules."""
    stored = {plain_name(name) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return [
        name
        for name, _ in named_values(model)
        if name in stored and any(within(name, module) for module in modules_to_save or ())
    ]


def embeddings(model: nn.Module) -> set[int]:
    """id() of the embeddings' Parameters, which PEFT saves if their size was changed or they are adapted."""
    found = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, name, lambda: None)()
        except (AttributeError, NotImplementedError):  # transformers raises these if a model has none
            continue
        if isinstance(module, nn.Module):
            found |= {id(parameter) for parameter in module.parameters()}
    return found


def within(parameter: str, module: str) -> bool:
    """Whether a parameter belongs to a module whose dotted name ends with `module`, by PEFT's rule (`inside`)."""
    return inside(parameter.rpartition(".")[0], module)
