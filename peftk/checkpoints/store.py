"""Saves and loads a model's adapters, in HF PEFT's format, AdapterHub's, or peftk's own for everything else."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftk.adapters import checks
from peftk.checkpoints import adapterhub, files, fitting, native, peft
from peftk.checkpoints.contents import (
    _ORIGIN,
    AnyPath,
    Contents,
    Origin,
    every_lora_layer,
    named_values,
    origin_of,
    trained_names,
)
from peftk.checkpoints.files import CheckpointError, plain_name
from peftk.methods.inject import lora_layers
from peftk.methods.plan import Config, apply_configs, check_without_peft, unwrapped
from peftk.methods.trial import lazy_trial
from peftk.system import interrupts, sharded


def save_adapter(model: nn.Module, path: AnyPath, *, format: str | None = None) -> None:
    """Writes the adapters that `inject` put into a model, and the model's own trained parameters, into a folder.

    Args:
        model: with adapters.
        path: of the folder; it is created if need be.
        format: "peft" (LoRA; HF PEFT and `MultiAdapter.load` read it), "peftk" (any methods, several at once), None for
            the first of these that can hold everything, or "adapterhub" (bottleneck adapters; the adapters library
            reads it).

    The config has the fields of the last loaded checkpoint about the base model, its revision and the task; else the
    model's `name_or_path`. If layers are merged, A and B are written, and no merged weight.

    Raises TypeError or ValueError if the model has no adapter or the format cannot hold what it has. A failure leaves
    an earlier checkpoint as it was.
    """
    if format is not None and format not in files.FORMATS:
        raise ValueError(f"format: expected one of {', '.join(files.FORMATS)} or None, got {format!r}")
    model = _checked(model)
    names = trained_names(model)
    if not names:
        raise ValueError("model: expected LoRALinear layers or other adapters (peftk.inject puts them in), got none")
    if format == "adapterhub":
        adapterhub.save_model(model, path)
        return
    reason = peft.cannot_hold(model, names)
    if format == "peft" and reason is not None:
        raise ValueError(f"format: expected what a LoRA checkpoint of HF PEFT can hold, got {reason}")
    if format == "peft" or (format is None and reason is None):
        peft.save_model(model, path)
    else:
        native.save_model(model, path, names)


def load_adapter(model: nn.Module, path: AnyPath) -> None:
    """Loads a checkpoint of HF PEFT (LoRA), AdapterHub (bottleneck adapters) or peftk into a model.

    A model without adapters gets them first, by the checkpoint's config. A model with adapters must have and train
    exactly what the checkpoint brings, with the same ranks; its LoRA layers also take over lora_alpha and use_rslora.
    Embeddings that PEFT saved because their size was changed are loaded into the model, as in PEFT. Values are rounded
    once, to the dtype of their place in the model.

    Raises CheckpointError for a checkpoint that is damaged, unsupported, or does not fit the model; ValueError if a
    layer is merged or the model has adapters of HF PEFT. The model is unchanged then, without adapters if it had none.
    """
    model = _checked(model)
    folder = files.folder(path)
    check_without_peft(model)
    kind = files.checkpoint_format(files.read_config(folder))
    for name, layer in lora_layers(model):
        if layer.merged:
            raise ValueError(f"model: expected {name} to be unmerged before its adapter changes, got a merged layer")
    if kind == "peft":
        loaded = peft.load(folder)
        with lazy_trial(model):
            fitting.check(fitting.without_layers(model, dict(every_lora_layer(model))), loaded)
            with _injected(model, [loaded.lora_config()], path):
                _fill(model, peft.contents_of(model, loaded), path)
    elif kind == "adapterhub":
        bottlenecks = adapterhub.load(folder)
        with _injected(model, [bottlenecks.config], path):
            _fill(model, adapterhub.contents_of(model, bottlenecks), path)
    else:
        own = native.load(folder)
        with _injected(model, own.configs, path):
            _fill(model, native.contents_of(model, own, path), path)


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return unwrapped(model)


@contextlib.contextmanager
def _injected(model: nn.Module, configs: Sequence[Config], path: AnyPath) -> Any:
    """Within the `with`, a model without adapters has those of these configs. They are removed if the block fails."""
    if trained_names(model):
        yield
        return
    with contextlib.ExitStack() as undo:
        try:
            undo.enter_context(apply_configs(model, configs))
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: expected a checkpoint that fits the model: {error}") from error
        yield


def _fill(model: nn.Module, contents: Contents, path: AnyPath) -> None:
    """Copies a checkpoint's contents into the model, or none of them if one fails."""
    state = dict(named_values(model))
    places: list[tuple[Tensor, Tensor, Tensor]] = []  # (target, new value, present value)
    for name, value in contents.tensors.items():
        if not sharded.is_sharded(state[name]):
            checks.dense(name, state[name])
        checks.writable(name, state[name])
        place = state[name].detach()
        if isinstance(state[name], nn.Parameter):
            files.finite(path, name, value)
        places.append((place, fitting.fitted(path, name, value, place).to(place.device), place.clone()))
    origin = origin_of(model)
    embeddings = dict.fromkeys((*origin.embeddings, *contents.origin.embeddings))
    with torch.no_grad(), interrupts.deferred():
        try:
            for place, value, _ in places:
                sharded.copy(place, value)
        except BaseException:
            for place, _, before in places:
                sharded.copy(place, before)
            raise
        for name, layer in lora_layers(model):
            if plain_name(name) in contents.alphas:
                layer.lora_alpha, layer.use_rslora = contents.alphas[plain_name(name)]
        model.__dict__[_ORIGIN] = Origin(contents.origin.about, tuple(embeddings))
