"""Checks that an HF PEFT checkpoint fits a model, for `load_adapter`, `switch_adapter` and `MultiAdapter.load`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftk.checkpoints import files
from peftk.checkpoints.contents import embeddings, named_values, saved_names, tied, with_aliases
from peftk.checkpoints.files import CheckpointError, plain_name
from peftk.checkpoints.peft import LoadedCheckpoint
from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.replace import conv1d, fan_in_fan_out


def check(model: nn.Module, loaded: LoadedCheckpoint) -> None:
    """Raises CheckpointError unless the checkpoint has exactly the tensors that its config needs in this model.

    model: without adapters (`without_layers`). Every tensor must have the shape that the model needs, and values that
    are finite in the model's dtype. Nothing is changed.
    """
    path = loaded.path
    config = loaded.lora_config()
    try:
        linears, trained = config.wanted(model)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint that fits the model: {error}") from error
    first_names = {id(linear): name for name, linear in reversed(linears.items())}  # a linear may have several names
    targets = {plain_name(name): linears[name] for name in linears if first_names[id(linears[name])] == name}
    files.same_names(path, "an adapter for each linear that its config names", loaded.adapters, targets)
    for name, linear in targets.items():
        weight = linear.get_parameter("weight")
        N, K = weight.t().shape if fan_in_fan_out(linear) else weight.shape
        if weight.is_meta:
            raise CheckpointError(f"{path}: {name}: expected a weight with memory in the model, got one on meta")
        lora_A, lora_B = loaded.adapters[name][:2]
        if lora_A.shape[1] != K or lora_B.shape[0] != N:
            raise CheckpointError(
                f"{path}: {name}: expected lora_A [R, {K}] and lora_B [{N}, R] for the model's linear, "
                f"got {list(lora_A.shape)} and {list(lora_B.shape)}"
            )
    places = dict(named_values(model))
    saved = saved_names(model, loaded.config.get("modules_to_save"))
    files.same_names(
        path,
        "the biases and modules_to_save that its config names in the model",
        {**loaded.biases, **loaded.saved},
        {*saved, *with_aliases(model, map(plain_name, trained), loaded.biases)},
    )
    parameters = {plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in {**loaded.biases, **loaded.saved}.items():
        if name in parameters:  # buffers, such as masks, may hold inf
            files.finite(path, name, value)
        fitted(path, name, value, places[name])
    of_embeddings = embeddings(model)
    for name, value in loaded.base.items():
        if name not in places or id(places[name]) not in of_embeddings:
            got = f"{name}, a different weight" if name in places else f"{name}, which the model does not have"
            raise CheckpointError(
                f"{path}: expected no tensor beyond what its config names except the model's embeddings, got {got}"
            )
        if value.shape != places[name].shape:
            raise CheckpointError(
                f"{path}: {name}: expected the size of the model's embeddings, {list(places[name].shape)}, "
                f"got {list(value.shape)}; give the model that size first (resize_token_embeddings)"
            )
        fitted(path, name, value, places[name])
    brought = {**loaded.biases, **loaded.saved, **loaded.base}
    for alias, name in tied(model, loaded.saved).items():
        if alias not in brought:
            raise CheckpointError(
                f"{path}: expected modules_to_save that share no weight with others, got {name}, which is also {alias}"
            )
    seen: dict[int, str] = {}
    for name, value in brought.items():
        other = seen.setdefault(id(places[name]), name)
        if not torch.equal(brought[other], value):
            raise CheckpointError(
                f"{path}: expected the same values for {other} and {name}, which are one weight in the model, got "
                "different ones"
            )


def same_base(loaded: LoadedCheckpoint, values: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a weight of the base model in the checkpoint differs in any bit from the model's.

    values: the model's, by name.
    """
    for name, value in loaded.base.items():
        base = values[name].detach()
        if not torch.equal(value.to(base.device, base.dtype), base):
            raise CheckpointError(
                f"{loaded.path}: {name}: expected the base model's own weight, got a different one, which would change "
                "the model for all adapters; load it with peftk.load_adapter, into a separate model"
            )


def fitted(path: object, name: str, value: Tensor, place: Tensor) -> Tensor:
    """The value in the dtype of its place in the model. Raises CheckpointError if it does not fit there."""
    if place.is_meta:
        raise CheckpointError(f"{path}: {name}: expected a tensor with memory in the model, got one on meta")
    if value.shape != place.shape or (
        value.dtype != place.dtype and not (value.is_floating_point() and place.is_floating_point())
    ):
        raise CheckpointError(
            f"{path}: {name}: expected {place.dtype} {list(place.shape)}, got {value.dtype} {list(value.shape)}"
        )
    return files.converted(path, name, value, place.dtype)


def without_layers(model: nn.Module, layers: Mapping[str, FrozenLinear]) -> nn.Module:
    """The model without these layers of ours, with linears in their places, and without compiled wrappers.

    The modules around these places are copies that share everything else with the model. The model does not change.
    """
    copies: dict[str, nn.Module] = {}

    def parent_of(name: str) -> dict[str, nn.Module | None]:
        parent = name.rpartition(".")[0]
        if parent not in copies:
            module = model.get_submodule(parent)
            copies[parent] = twin = module.__new__(type(module))
            twin.__dict__.update(module.__dict__, _modules=dict(module._modules))
            if parent:
                parent_of(parent)[parent.rpartition(".")[2]] = twin
        return copies[parent]._modules

    plain: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        if id(layer) not in plain:
            plain[id(layer)] = _linear(layer)
        parent_of(name)[name.rpartition(".")[2]] = plain[id(layer)]
    compiled = [name for name, module in model.named_modules() if name and "_orig_mod" in module._modules]
    for name in reversed(compiled):  # inner modules first
        inner = copies.get(name, model.get_submodule(name))._modules["_orig_mod"]
        parent_of(name)[name.rpartition(".")[2]] = inner
    return copies.get("", model)


def _linear(layer: FrozenLinear) -> nn.Module:
    """A linear (or Conv1D) with the layer's weight and bias."""
    if layer.fan_in_fan_out:
        with torch.device("meta"):
            linear: nn.Module = conv1d()(layer.out_features, layer.in_features)
    else:  # without nn.Linear's initialization: a server makes one per layer for every checkpoint
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.__dict__.update(in_features=layer.in_features, out_features=layer.out_features)
    linear._parameters.update({"weight": layer._parameters["weight"], "bias": layer._parameters.get("bias")})
    return linear
