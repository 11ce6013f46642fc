"""Selects the modules that a config names: by names, regular expressions, "all-linear", layer numbers, as in HF PEFT.

If a config names something that the model does not have, there is a warning if the rest can be done, else an error.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from peftk.methods.fields import Names
from peftk.methods.plan import trained_in_place
from peftk.methods.trial import reader
from peftk.nn.attached import Attached
from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.replace import as_linear, is_linear

ALL_LINEAR = "all-linear"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def matches(names: Names, module: str) -> bool:
    """Whether `names` match a module. A string is a regular expression for the full dotted name, a list has endings."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def matched(names: Names, modules: Iterable[str]) -> list[str]:
    """The modules that the names match."""
    if isinstance(names, str):
        return [module for module in modules if matches(names, module)]
    wanted = frozenset(names)
    return [module for module in modules if not wanted.isdisjoint(_ends(module))]


def unmatched(names: Names, modules: Iterable[str]) -> list[str]:
    """The names (or the regular expression) that match none of the modules."""
    if isinstance(names, str):
        return [] if any(matches(names, module) for module in modules) else [names]
    ends = {end for module in modules for end in _ends(module)}
    return [name for name in names if name not in ends]


def inside(module: str, name: str) -> bool:
    """PEFT's rule for modules that train in full: those whose name ends with `name`, at a dot or not, and all inside.

    So "classifier" also means `pre_classifier`.
    """
    return f"{name}." in f"{module}."


def layer_number(module: str, layers_pattern: Names | None = None) -> int | None:
    """The number of a module's layer: the first number in its name, or the one after `layers_pattern`.

    PEFT's rule: `encoder.layer.3.attention.self.query` is in layer 3. Without a pattern, PEFT skips a number right
    after the first name, as in `layers.3.q_proj`; if there is no other number, that one counts here.
    """
    if not layers_pattern:
        number = _number_after_first_list(module)
        return first_number(module) if number is None else number
    for pattern in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
        found = re.match(_layer_number_regex(pattern), module)
        if found is not None:
            return None if found["number"] is None else int(found["number"])
    return None


def first_number(module: str) -> int | None:
    """The first number in a module's dotted name that is neither the first nor the last part."""
    found = re.search(r"(?:^|\.)[^.]+\.(\d+)\.", module)
    return None if found is None else int(found[1])


def check_layers_pattern(patterns: Names) -> None:
    """Raises ValueError for a pattern that is not a regular expression in front of a layer's number."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            re.compile(_layer_number_regex(pattern))
        except re.error as error:
            raise ValueError(f"layers_pattern: expected regular expressions, got {pattern!r} ({error})") from error


class Targets(NamedTuple):
    """The linears to replace, under each of their names, and texts about what in the config has no effect."""

    linears: dict[str, nn.Module]
    idle: list[str]


def target_linears(
    model: nn.Module,
    target_modules: Names,
    *,
    exclude_modules: Names | None = None,
    layers_to_transform: Sequence[int] | None = None,
    layers_pattern: Names | None = None,
    modules_to_save: Collection[str] = (),
) -> Targets:
    """The linears to replace.

    Raises ValueError or TypeError if nothing matches, or if a match cannot be replaced.
    """
    modules = _modules(model)
    if is_linear(model):
        raise ValueError("model: expected a module that contains linears, got an nn.Linear; use LoRALinear.from_linear")
    if target_modules == ALL_LINEAR:
        wanted = _all_linear(model, modules, modules_to_save)
    else:
        wanted = matched(target_modules, modules)
    remaining = wanted
    if exclude_modules is not None:
        excluded = set(matched(exclude_modules, remaining))
        remaining = [name for name in remaining if name not in excluded]
    # modules that train in full get no adapter
    remaining = [name for name in remaining if not any(_trains_in_full(saved, name) for saved in modules_to_save)]
    found, numbers = remaining, {}
    if layers_to_transform is not None:
        # a full name is selected in any layer
        full = frozenset(() if isinstance(target_modules, str) else target_modules)
        numbers = {name: layer_number(name, layers_pattern) for name in remaining if name not in full}
        found = [name for name in remaining if name not in numbers or numbers[name] in layers_to_transform]
    experts = _experts(modules, target_modules)
    if not found:
        raise ValueError(_no_target(target_modules, modules, wanted, remaining) + (f"; {experts}" if experts else ""))
    for name in found:
        _check_target(model, name, modules[name])
        for saved in modules_to_save:
            if inside(name, saved):
                raise ValueError(
                    f"modules_to_save: expected modules without adapters, got {saved!r}, by which {name} trains in "
                    "full although it is a target; add it to exclude_modules"
                )
    idle = [f"target_modules: {experts}"] if experts else []
    if not isinstance(target_modules, str):
        idle += _idle_targets(target_modules, modules, remaining, found)
    if exclude_modules is not None:
        idle += _idle_exclusions(exclude_modules, modules, wanted, found)
    if layers_to_transform is not None:
        idle += _idle_layers(layers_to_transform, layers_pattern, remaining, numbers)
    return Targets({name: modules[name] for name in found}, idle)


def saved_modules(model: nn.Module, modules_to_save: Collection[str]) -> list[str]:
    """The modules that train in full, without their submodules.

    Raises ValueError for a name that matches no module with parameters, and for a module inside of another match;
    TypeError for a container.
    """
    modules = _modules(model)
    found: dict[str, None] = {}
    for saved in modules_to_save:
        matching = [name for name in modules if name.endswith(saved)]
        if not any(True for name in matching for _ in modules[name].parameters()):
            raise ValueError(f"modules_to_save: expected names of modules that have parameters, got {saved!r}")
        found |= dict.fromkeys(matching)
    for name in found:
        if isinstance(modules[name], _CONTAINERS):
            raise TypeError(
                f"modules_to_save: expected modules that are called, got {name}, a {type(modules[name]).__name__}"
            )
        around = next((other for other in found if name.startswith(f"{other}.")), None)
        if around is not None:
            raise ValueError(f"modules_to_save: expected no module inside of another, got {name}, inside of {around}")
    return list(found)


def check_called(model: nn.Module, field: str, name: str) -> None:
    """Raises ValueError if the module is a linear that the model does not call, but whose weight it reads."""
    module = model.get_submodule(name)
    kind = reader(model, name, module) if is_linear(module) else None
    if kind is not None:
        raise ValueError(f"{field}: expected linears that are called, got {name}, whose weight {kind} reads itself")


def target_modules(model: nn.Module, field: str, names: Names) -> dict[str, nn.Module]:
    """The modules of any kind that `names` match, by name, each once, without adapters.

    Raises ValueError if nothing matches; warns if only some names match nothing.
    """
    modules = _modules(model, remove_duplicate=True)
    found = matched(names, modules)
    if not found:
        present = ", ".join(list(modules)[:8])
        raise ValueError(f"{field}: expected to match some module of the model ({present}, …), got {names!r}")
    for name in unmatched(names, found):
        warn(f"{field}: {name!r} matches no module of the model")
    return {name: modules[name] for name in found}


def pattern_key(pattern: Iterable[str], module: str) -> str | None:
    """PEFT's rule: the first key that, as a regular expression, matches the module's name, in full or from a dot on."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """A pattern's value for a module: that of its `pattern_key`, or else of a key that is literally its name."""
    key = pattern_key(pattern, module)
    return pattern.get(module if key is None else key, default)


def idle_keys(field: str, pattern: Iterable[str], targets: Collection[str]) -> Iterator[str]:
    """Texts about the keys of a pattern that are used for no target."""
    used = {pattern_key(pattern, name) for name in targets} | set(targets)
    for key in pattern:
        if key in used:
            continue
        if any(pattern_key([key], name) for name in targets):
            yield f"{field}: {key!r} is not used, as keys before it match the same modules"
        else:
            yield f"{field}: {key!r} matches none of the adapted modules"


def warn(message: str) -> None:
    """Warns, at the line that called peftk, that a part of a config has no effect."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] in ("peftk", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _modules(model: nn.Module, *, remove_duplicate: bool = False) -> dict[str, nn.Module]:
    """The model's modules under each of their names, without the model itself and adapters."""
    modules = dict(model.named_modules(remove_duplicate=remove_duplicate))
    adapters = tuple(f"{name}." for name, module in modules.items() if isinstance(module, Attached))
    return {name: module for name, module in modules.items() if name and not f"{name}.".startswith(adapters)}


def _ends(module: str) -> list[str]:
    """The names by which a list matches a module: `a.b.c`, `b.c` and `c`."""
    steps = module.split(".")
    return [".".join(steps[first:]) for first in range(len(steps))]


def _layer_number_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\."


def _number_after_first_list(module: str) -> int | None:
    found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return None if found is None else int(found[1])


def _trains_in_full(saved: str, module: str) -> bool:
    """PEFT's rule for modules that get no adapter as they train in full. Unlike `inside`, it matches from a dot on."""
    return re.match(rf"(^|.*\.){saved}($|\..*)", module) is not None


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], modules_to_save: Collection[str]) -> list[str]:
    """Every linear without an adapter, except the output embedding, linears that train in full, and uncalled ones."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    trained = trained_in_place(model)
    return [
        name
        for name, module in modules.items()
        if is_linear(module)
        and module is not head
        and id(module.weight) not in trained
        and not any(inside(name, saved) for saved in modules_to_save)
        and reader(model, name, module) is None
    ]


def _experts(modules: Mapping[str, nn.Module], target_modules: Names) -> str | None:
    """A text for the case that targets name a Parameter in which transformers keeps the weights of all experts.

    Earlier versions had linears of these names, one per expert. PEFT adapts the Parameter; no kernel here does.
    """
    for module, owner in modules.items():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.dim() == 3 and name.endswith("_proj"):
                parts = (name, "gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
                if target_modules == ALL_LINEAR or matched(target_modules, [f"{module}.{part}" for part in parts]):
                    return f"{module}.{name} is one Parameter for all experts, not a linear, and gets no adapter"
    return None


def _check_target(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raises ValueError or TypeError unless the module can get an adapter."""
    if isinstance(module, FrozenLinear) and not module.adds_nothing:
        raise ValueError(f"target_modules: expected linears, got {name}, which a method has replaced already")
    if not is_linear(module):
        raise TypeError(
            f"target_modules: expected only linears (nn.Linear, Conv1D), got {name}, of class {type(module).__name__}"
        )
    check_called(model, "target_modules", name)
    try:
        as_linear(module)
    except TypeError as error:
        raise TypeError(f"target_modules: {name}: {error}") from error


def _no_target(target_modules: Names, modules: Mapping[str, nn.Module], wanted: list[str], remaining: list[str]) -> str:
    """The message if there is no target."""
    which = "some linear of the model"
    if target_modules == ALL_LINEAR:
        which += " that is called, is not the output embedding, is not replaced yet and does not train in full"
    if remaining:
        which += f" in layers_to_transform; {', '.join(remaining[:8])} are in other layers"
    elif wanted:
        which += f" that exclude_modules and modules_to_save leave; they take {', '.join(wanted[:8])}"
    elif target_modules != ALL_LINEAR:
        linears = [name for name, module in modules.items() if is_linear(module)]
        which += f" ({', '.join(linears[:8]) or 'none'}, …)"
    text = f"target_modules: expected to match {which}, got {target_modules!r}"
    if isinstance(target_modules, str) and matched([target_modules], modules):
        text += f"; a string is a regular expression for full names, [{target_modules!r}] matches endings of names"
    return text


def _idle_targets(
    names: Collection[str], modules: Iterable[str], remaining: Collection[str], found: Collection[str]
) -> Iterator[str]:
    for name in unmatched(names, modules):
        yield f"target_modules: {name!r} matches no module of the model"
    # no message for those that exclude_modules or modules_to_save take
    taken = set(unmatched(names, remaining))
    for name in unmatched(names, found):
        if name not in taken:
            yield f"target_modules: {name!r} matches no module in layers_to_transform"


def _idle_exclusions(names: Names, modules: Mapping[str, Any], wanted: list[str], found: list[str]) -> Iterator[str]:
    for name in [names] if isinstance(names, str) else names:
        pattern: Names = names if isinstance(names, str) else [name]
        excluded = matched(pattern, modules)
        if not excluded:
            yield f"exclude_modules: {name!r} matches no module of the model"
        elif not matched(pattern, wanted):
            inner = next((n for n in found if n.startswith(tuple(f"{module}." for module in excluded))), None)
            if inner is not None:
                yield (
                    f"exclude_modules: {name!r} matches {excluded[0]}, but not the modules inside: {inner} gets an "
                    rf"adapter; the regular expression '.*{re.escape(name)}\..*' leaves that out"
                )


def _idle_layers(
    layers: Sequence[int], layers_pattern: Names | None, remaining: list[str], numbers: Mapping[str, int | None]
) -> Iterator[str]:
    if not numbers:
        yield "layers_to_transform: no effect, as all targets have full names"
        return
    present = {layer_number(name, layers_pattern) for name in remaining}
    for number in dict.fromkeys(layers):
        if number not in present:
            yield f"layers_to_transform: no target is in layer {number}"
    for name, ours in numbers.items():
        first, theirs = first_number(name), _number_after_first_list(name)
        if not layers_pattern and theirs != first:
            read = "no layer number" if theirs is None else f"layer {theirs}"
            yield (
                f"layers_to_transform: HF PEFT reads {read} in {name}, peftk reads {ours}; "
                f"with layers_pattern={name.partition('.')[0]!r} both read {first}"
            )
            return
