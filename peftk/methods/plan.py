"""What a config would do to a model, and how that is carried out: all of it or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from peftk.methods.trial import looking, partly_read
from peftk.nn import merging, shared
from peftk.nn.attached import Attached
from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.lora_linear import LoRALinear
from peftk.nn.watched import watch


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config would do to a model.

    layers: by module name, what takes the module's place. attached: module name and the adapter to hang on it.
    trained: names of the model's own parameters that train in place.
    """

    layers: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    attached: Sequence[tuple[str, Attached]] = ()
    trained: Sequence[str] = ()


class Config(Protocol):
    """A method's hyper-parameters. `plan` does all the checks; it may freeze weights, and changes nothing else."""

    def plan(self, model: nn.Module) -> Plan: ...


@dataclasses.dataclass(frozen=True)
class Injection:
    """The record that a model keeps of a plan that was carried out: names only, so that it survives any copy."""

    config: Config
    layers: tuple[str, ...]
    attached: tuple[str, ...]
    trained: tuple[str, ...]


_RECORD = "_peftk_injected"
# every layer of an adapter, what wraps a module that trains whole, and the model around them
_OF_PEFT = (
    ("peft.tuners.tuners_utils", "BaseTunerLayer"),
    ("peft.utils.other", "AuxiliaryTrainingWrapper"),
    ("peft.peft_model", "PeftModel"),
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what torch.compile, DataParallel or DistributedDataParallel returned for it."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def injections(model: nn.Module) -> tuple[Injection, ...]:
    """What was injected into the model, in order."""
    return model.__dict__.get(_RECORD, ())


def _record(model: nn.Module, records: tuple[Injection, ...] | None) -> None:
    if records is None:
        model.__dict__.pop(_RECORD, None)
    else:
        model.__dict__[_RECORD] = records


@contextlib.contextmanager
def carrying_out(model: nn.Module, configs: Sequence[Config], example_inputs: Any = None) -> Iterator[list[Injection]]:
    """Plans and carries out one config after the other, and freezes all else. example_inputs: as `inject`'s.

    Where one fails, or what is done within the `with`, none has happened.
    """
    without_peft(model)
    with looking(model, example_inputs), contextlib.ExitStack() as undo:
        undo.callback(_require_gradients, [(parameter, parameter.requires_grad) for parameter in model.parameters()])
        undo.callback(_record, model, model.__dict__.get(_RECORD))
        done = []
        for config in configs:
            plan = config.plan(model)
            for name, layer in plan.layers.items():
                if isinstance(layer, FrozenLinear) and not layer.adds_nothing:
                    watch(layer, name, partly_read(model, name))
                _replace(model, name, layer, undo)
            for name, adapter in plan.attached:
                _leave_fast_path(model, name, undo)
                module = model.get_submodule(name)
                adapter.attach(module)
                undo.callback(adapter.detach, module)
            record = Injection(
                config, tuple(plan.layers), tuple(name for name, _ in plan.attached), tuple(plan.trained)
            )
            model.__dict__[_RECORD] = (*injections(model), record)
            done.append(record)
        freeze(model)
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
        shared.note(model, merging.places(layers))
        yield done
        undo.pop_all()


def without_peft(model: nn.Module) -> None:
    """Raises ValueError for a model that holds adapters of HF PEFT, whose own parts no method of ours may adapt."""
    kinds = tuple(
        getattr(sys.modules[file], name)
        for file, name in _OF_PEFT
        if file in sys.modules and hasattr(sys.modules[file], name)  # without them nobody has made any
    )
    found = next((module for module in model.modules() if isinstance(module, kinds)), None)
    if found is not None:
        raise ValueError(
            f"model: expected one without HF PEFT's adapters, got one with a {type(found).__name__}; "
            "use what its merge_and_unload() returns, or keep it and call peftk.accelerate(model)"
        )


def trained_in_place(model: nn.Module) -> set[int]:
    """id() of the model's own parameters that an injected method trains in place."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {id(parameters[name]) for record in injections(model) for name in record.trained}


def freeze(model: nn.Module) -> nn.Module:
    """Makes every parameter frozen but those of adapters and those that a method trains in place; returns the model.

    Raises ValueError where a method trains a weight in place that the kernels of another hold frozen.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = trained_in_place(model)
    for path, module in model.named_modules():
        if isinstance(module, FrozenLinear) and not module.adds_nothing and id(module.weight) in trained:
            raise ValueError(
                f"trained: expected {path}.weight to train in no other method than that of {type(module).__name__}, "
                "which holds it frozen"
            )
        trained |= {id(p) for p in adapter_parameters(module).values()}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)
    return model


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the Parameters that this module itself (none of its children) adds to a model."""
    names: Sequence[str] = getattr(module, "adapter_parameters", ())
    return {name: parameter for name in names if (parameter := module._parameters.get(name)) is not None}


def of_adapter(model: nn.Module, name: str) -> bool:
    """Whether a parameter of this name is an adapter's, not the model's own."""
    module, _, parameter = name.rpartition(".")
    return parameter in adapter_parameters(model.get_submodule(module))


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` where the module `name` is."""
    with contextlib.ExitStack() as undo:
        _replace(model, name, layer, undo)
        undo.pop_all()


def _replace(model: nn.Module, name: str, layer: nn.Module, undo: contextlib.ExitStack) -> None:
    _leave_fast_path(model, name, undo)
    parent_name, _, child = name.rpartition(".")
    _set(model.get_submodule(parent_name), child, layer, undo)


def _leave_fast_path(model: nn.Module, name: str, undo: contextlib.ExitStack) -> None:
    """Takes the modules around and at `name` off torch's inference fast path, which would pass adapters by."""
    steps = name.split(".")
    for depth in range(len(steps) + 1):
        above = model.get_submodule(".".join(steps[:depth]))
        if isinstance(above, nn.TransformerEncoderLayer):
            # it reads linear1.weight itself
            _set(above, "activation_relu_or_gelu", 0, undo)
        if isinstance(above, nn.TransformerEncoder):
            # only that fast path takes the nested tensors that it makes of padded batches
            _set(above, "use_nested_tensor", False, undo)


def _set(owner: nn.Module, name: str, value: object, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _require_gradients(before: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, required in before:
        parameter.requires_grad_(required)
