"""Plans what configs do to a model, and applies the plans: completely or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from peftk.methods.trial import any_reader, lazy_trial
from peftk.nn import merging, shared
from peftk.nn.attached import Attached
from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.lora_linear import LoRALinear
from peftk.nn.watched import watch


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config does to a model.

    layers: new layers, by the name of the module that each replaces. attached: adapters, with the name of the module to
    which each is attached. trained: names of the model's own parameters that train in place.
    """

    layers: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    attached: Sequence[tuple[str, Attached]] = ()
    trained: Sequence[str] = ()


class Config(Protocol):
    """A method's hyper-parameters. `plan` does all checks. It may freeze weights, but changes nothing else."""

    def plan(self, model: nn.Module) -> Plan: ...


@dataclasses.dataclass(frozen=True)
class Injection:
    """The record that a model keeps of an applied plan. It holds names only, so that it stays valid in copies."""

    config: Config
    layers: tuple[str, ...]
    attached: tuple[str, ...]
    trained: tuple[str, ...]


_RECORD = "_peftk_injected"
# PEFT's adapter layers, its wrappers of modules that train in full, and its models
_PEFT_CLASSES = (
    ("peft.tuners.tuners_utils", "BaseTunerLayer"),
    ("peft.utils.other", "AuxiliaryTrainingWrapper"),
    ("peft.peft_model", "PeftModel"),
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers of torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def injections(model: nn.Module) -> tuple[Injection, ...]:
    """The records of what was injected into the model, in order."""
    return model.__dict__.get(_RECORD, ())


def _record(model: nn.Module, records: tuple[Injection, ...] | None) -> None:
    if records is None:
        model.__dict__.pop(_RECORD, None)
    else:
        model.__dict__[_RECORD] = records


@contextlib.contextmanager
def apply_configs(model: nn.Module, configs: Sequence[Config], example_inputs: Any = None) -> Iterator[list[Injection]]:
    """Plans and applies one config after the other, and freezes everything else. example_inputs: as in `inject`.

    If a config fails, or the body of the `with`, everything is undone.
    """
    check_without_peft(model)
    with lazy_trial(model, example_inputs), contextlib.ExitStack() as undo:
        undo.callback(_set_requires_grad, [(parameter, parameter.requires_grad) for parameter in model.parameters()])
        undo.callback(_record, model, model.__dict__.get(_RECORD))
        done = []
        for config in configs:
            plan = config.plan(model)
            for name, layer in plan.layers.items():
                if isinstance(layer, FrozenLinear) and not layer.adds_nothing:
                    watch(layer, name, any_reader(model, name))
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


def check_without_peft(model: nn.Module) -> None:
    """Raises ValueError for a model with adapters of HF PEFT, whose modules our methods must not adapt."""
    kinds = tuple(
        getattr(sys.modules[file], name)
        for file, name in _PEFT_CLASSES
        if file in sys.modules and hasattr(sys.modules[file], name)  # if peft is not imported, there are none
    )
    found = next((module for module in model.modules() if isinstance(module, kinds)), None)
    if found is not None:
        raise ValueError(
            f"model: expected one without HF PEFT's adapters, got one with a {type(found).__name__}; "
            "use the result of its merge_and_unload(), or keep the adapters and call peftk.accelerate(model)"
        )


def trained_in_place(model: nn.Module) -> set[int]:
    """id() of the model's own parameters that an injected method trains in place."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {id(parameters[name]) for record in injections(model) for name in record.trained}


def freeze(model: nn.Module) -> nn.Module:
    """Freezes every parameter except those of adapters and those that a method trains in place. Returns the model.

    Raises ValueError if a method trains a weight in place that the layer of another method keeps frozen.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = trained_in_place(model)
    for path, module in model.named_modules():
        if isinstance(module, FrozenLinear) and not module.adds_nothing and id(module.weight) in trained:
            raise ValueError(
                f"trained: expected {path}.weight to be frozen, as {type(module).__name__} needs it, got a method that "
                "trains it"
            )
        trained |= {id(p) for p in adapter_parameters(module).values()}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)
    return model


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The Parameters that this module itself, without its children, adds to a model, by name."""
    names: Sequence[str] = getattr(module, "adapter_parameters", ())
    return {name: parameter for name in names if (parameter := module._parameters.get(name)) is not None}


def is_adapter_parameter(model: nn.Module, name: str) -> bool:
    """Whether the parameter of this name belongs to an adapter, not to the model itself."""
    module, _, parameter = name.rpartition(".")
    return parameter in adapter_parameters(model.get_submodule(module))


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replaces the module `name` of the model by `layer`."""
    with contextlib.ExitStack() as undo:
        _replace(model, name, layer, undo)
        undo.pop_all()


def _replace(model: nn.Module, name: str, layer: nn.Module, undo: contextlib.ExitStack) -> None:
    _leave_fast_path(model, name, undo)
    parent_name, _, child = name.rpartition(".")
    _set(model.get_submodule(parent_name), child, layer, undo)


def _leave_fast_path(model: nn.Module, name: str, undo: contextlib.ExitStack) -> None:
    """Disables torch's inference fast path, which would skip adapters, in the module `name` and those around it."""
    steps = name.split(".")
    for depth in range(len(steps) + 1):
        above = model.get_submodule(".".join(steps[:depth]))
        if isinstance(above, nn.TransformerEncoderLayer):
            # its fast path reads linear1.weight instead of calling linear1
            _set(above, "activation_relu_or_gelu", 0, undo)
        if isinstance(above, nn.TransformerEncoder):
            # it would make nested tensors of padded batches, which only the fast path takes
            _set(above, "use_nested_tensor", False, undo)


def _set(owner: nn.Module, name: str, value: object, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _set_requires_grad(before: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, required in before:
        parameter.requires_grad_(required)
