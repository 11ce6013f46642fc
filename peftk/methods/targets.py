"""Which modules of a model a config means: names, regular expressions, "all-linear", layer numbers. As HF PEFT's.

What a config names and the model does not have is told: by a warning where the rest can be done, as PEFT does it, else
by an error.
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
    """A string is a regular expression that matches the dotted name whole; a list holds names that end it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def matched(names: Names, modules: Iterable[str]) -> list[str]:
    """Those of the modules that the names match."""
    if isinstance(names, str):
        return [module for module in modules if matches(names, module)]
    wanted = frozenset(names)
    return [module for module in modules if not wanted.isdisjoint(_ends(module))]


def unmatched(names: Names, modules: Iterable[str]) -> list[str]:
    """Those of the names, or the regular expression, that match none of the modules."""
    if isinstance(names, str):
        return [] if any(matches(names, module) for module in modules) else [names]
    met = {end for module in modules for end in _ends(module)}
    return [name for name in names if name not in met]


def inside(module: str, name: str) -> bool:
    """PEFT's rule for what trains whole: a module whose name ends with `name`, at a dot or not, and all within it.

    So "classifier" means `pre_classifier` too.
    """
    return f"{name}." in f"{module}."


def layer_number(module: str, layers_pattern: Names | None = None) -> int | None:
    """The number of the layer that a module lies in: the first one in its name, or the one behind `layers_pattern`.

    PEFT's rule: `encoder.layer.3.attention.self.query` lies in layer 3. Without a pattern PEFT passes the very first
    list by, as in `layers.3.q_proj`; where it finds no other number, that one counts here.
    """
    if not layers_pattern:
        number = _passing_first_list(module)
        return first_number(module) if number is None else number
    for pattern in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
        found = re.match(_behind(pattern), module)
        if found is not None:
            return None if found["number"] is None else int(found["number"])
    return None


def first_number(module: str) -> int | None:
    """The first number in a module's dotted name that has a name before it and something behind it."""
    found = re.search(r"(?:^|\.)[^.]+\.(\d+)\.", module)
    return None if found is None else int(found[1])


def check_layers_pattern(patterns: Names) -> None:
    """Raises ValueError for one that is no regular expression before a layer's number."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            re.compile(_behind(pattern))
        except re.error as error:
            raise ValueError(f"layers_pattern: expected regular expressions, got {pattern!r} ({error})") from error


class Targets(NamedTuple):
    """The linears to replace, by every name under which one is reached, and, in words, what of a config is idle."""

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

    Raises ValueError or TypeError where nothing matches, or where something matches that cannot be replaced.
    """
    modules = _modules(model)
    if is_linear(model):
        raise ValueError("model: expected a module that contains linears, got an nn.Linear; use LoRALinear.from_linear")
    if target_modules == ALL_LINEAR:
        wanted = _all_linear(model, modules, modules_to_save)
    else:
        wanted = matched(target_modules, modules)
    left = wanted
    if exclude_modules is not None:
        out = set(matched(exclude_modules, left))
        left = [name for name in left if name not in out]
    # what trains whole gets no adapter besides
    left = [name for name in left if not any(_kept_whole(kept, name) for kept in modules_to_save)]
    found, numbers = left, {}
    if layers_to_transform is not None:
        # a name given in full is meant wherever it lies
        full = frozenset(() if isinstance(target_modules, str) else target_modules)
        numbers = {name: layer_number(name, layers_pattern) for name in left if name not in full}
        found = [name for name in left if name not in numbers or numbers[name] in layers_to_transform]
    experts = _experts(modules, target_modules)
    if not found:
        raise ValueError(_nothing(target_modules, modules, wanted, left) + (f"; {experts}" if experts else ""))
    for name in found:
        _check_target(model, name, modules[name])
        for kept in modules_to_save:
            if inside(name, kept):
                raise ValueError(
                    f"modules_to_save: expected modules without adapters, got {kept!r}, for which {name} trains whole, "
                    "and it is a target; exclude_modules takes it out of these"
                )
    idle = [f"target_modules: {experts}"] if experts else []
    if not isinstance(target_modules, str):
        idle += _idle_targets(target_modules, modules, left, found)
    if exclude_modules is not None:
        idle += _idle_exclusions(exclude_modules, modules, wanted, found)
    if layers_to_transform is not None:
        idle += _idle_layers(layers_to_transform, layers_pattern, left, numbers)
    return Targets({name: modules[name] for name in found}, idle)


def saved_modules(model: nn.Module, modules_to_save: Collection[str]) -> list[str]:
    """The modules that train whole, each without those within it.

    Raises ValueError for a name that ends no module's name, or only those of modules without parameters, and for a
    module within another one; TypeError for a mere container.
    """
    modules = _modules(model)
    found: dict[str, None] = {}
    for kept in modules_to_save:
        ends = [name for name in modules if name.endswith(kept)]
        if not any(True for name in ends for _ in modules[name].parameters()):
            raise ValueError(f"modules_to_save: expected names of modules that have parameters, got {kept!r}")
        found |= dict.fromkeys(ends)
    for name in found:
        if isinstance(modules[name], _CONTAINERS):
            raise TypeError(
                f"modules_to_save: expected modules that are called, got {name}, a {type(modules[name]).__name__}"
            )
        around = next((other for other in found if name.startswith(f"{other}.")), None)
        if around is not None:
            raise ValueError(f"modules_to_save: expected modules apart from each other, got {name}, within {around}")
    return list(found)


def called(model: nn.Module, field: str, name: str) -> None:
    """Raises ValueError where that is a linear whose weight the model reads, and which it does not call."""
    module = model.get_submodule(name)
    other = reader(model, name, module) if is_linear(module) else None
    if other is not None:
        raise ValueError(f"{field}: expected linears that are called, got {name}, whose weight {other} reads itself")


def target_modules(model: nn.Module, field: str, names: Names) -> dict[str, nn.Module]:
    """Any modules that are meant, by name, each once, but adapters.

    Raises ValueError where nothing matches; warns of a name that matches nothing while others do.
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
    """PEFT's rule: the first key that, as a regular expression, matches the end of the module's name from a dot on."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """What a pattern gives a module: its `pattern_key`'s value, or that of its very name, whatever that means."""
    key = pattern_key(pattern, module)
    return pattern.get(module if key is None else key, default)


def idle_keys(field: str, pattern: Iterable[str], targets: Collection[str]) -> Iterator[str]:
    """In words, the keys of a pattern that give no target its value."""
    used = {pattern_key(pattern, name) for name in targets} | set(targets)
    for key in pattern:
        if key in used:
            continue
        if any(pattern_key([key], name) for name in targets):
            yield f"{field}: {key!r} is never used, as keys before it match all that it matches"
        else:
            yield f"{field}: {key!r} matches none of the adapted modules"


def warn(message: str) -> None:
    """Says at the line that called peftk that a part of a config has no effect."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] in ("peftk", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _modules(model: nn.Module, *, remove_duplicate: bool = False) -> dict[str, nn.Module]:
    """The model's modules by each name under which they are reached, but the model itself and adapters."""
    modules = dict(model.named_modules(remove_duplicate=remove_duplicate))
    adapters = tuple(f"{name}." for name, module in modules.items() if isinstance(module, Attached))
    return {name: module for name, module in modules.items() if name and not f"{name}.".startswith(adapters)}


def _ends(module: str) -> list[str]:
    """`a.b.c`, `b.c`, `c`: the names that a list may hold to match a module."""
    steps = module.split(".")
    return [".".join(steps[first:]) for first in range(len(steps))]


def _behind(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\."


def _passing_first_list(module: str) -> int | None:
    found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return None if found is None else int(found[1])


def _kept_whole(kept: str, module: str) -> bool:
    """PEFT's rule for what gets no adapter as it trains whole. It is not `inside`: this one begins at a dot."""
    return re.match(rf"(^|.*\.){kept}($|\..*)", module) is not None


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], modules_to_save: Collection[str]) -> list[str]:
    """Every linear that is not a peftk layer yet but the output embedding, and what trains whole now or besides."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    whole = trained_in_place(model)
    return [
        name
        for name, module in modules.items()
        if is_linear(module)
        and module is not head
        and id(module.weight) not in whole
        and not any(inside(name, kept) for kept in modules_to_save)
        and reader(model, name, module) is None
    ]


def _experts(modules: Mapping[str, nn.Module], target_modules: Names) -> str | None:
    """In words, that the targets are meant to hold a Parameter in which transformers keeps the weights of all experts.

    It had linears of these names before, one an expert. PEFT adapts the Parameter; no kernel here does.
    """
    for module, owner in modules.items():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.dim() == 3 and name.endswith("_proj"):
                parts = (name, "gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
                if target_modules == ALL_LINEAR or matched(target_modules, [f"{module}.{one}" for one in parts]):
                    return f"{module}.{name} is one Parameter of all experts, no linear, and gets no adapter"
    return None


def _check_target(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raises ValueError or TypeError unless an adapter can stand beside it."""
    if isinstance(module, FrozenLinear) and not module.adds_nothing:
        raise ValueError(f"target_modules: expected linears, got {name}, which a method has replaced already")
    if not is_linear(module):
        raise TypeError(
            f"target_modules: expected linears (nn.Linear, Conv1D) alone, got {name}, of class {type(module).__name__}"
        )
    called(model, "target_modules", name)
    try:
        as_linear(module)
    except TypeError as error:
        raise TypeError(f"target_modules: {name}: {error}") from error


def _nothing(target_modules: Names, modules: Mapping[str, nn.Module], wanted: list[str], left: list[str]) -> str:
    """Why no target is left, in words."""
    which = "some linear of the model"
    if target_modules == ALL_LINEAR:
        which += " that is called, is no output embedding, is not replaced yet and does not train whole"
    if left:
        which += f" in layers_to_transform; {', '.join(left[:8])} lie elsewhere"
    elif wanted:
        which += f" that exclude_modules and modules_to_save leave; {', '.join(wanted[:8])} are taken by them"
    elif target_modules != ALL_LINEAR:
        linears = [name for name, module in modules.items() if is_linear(module)]
        which += f" ({', '.join(linears[:8]) or 'none'}, …)"
    text = f"target_modules: expected to match {which}, got {target_modules!r}"
    if isinstance(target_modules, str) and matched([target_modules], modules):
        text += f"; a string is a regular expression for whole names, [{target_modules!r}] matches names that end so"
    return text


def _idle_targets(
    names: Collection[str], modules: Iterable[str], left: Collection[str], found: Collection[str]
) -> Iterator[str]:
    for name in unmatched(names, modules):
        yield f"target_modules: {name!r} matches no module of the model"
    # those that exclude_modules or modules_to_save take are gone on purpose
    gone = set(unmatched(names, left))
    for name in unmatched(names, found):
        if name not in gone:
            yield f"target_modules: {name!r} matches no module in layers_to_transform"


def _idle_exclusions(names: Names, modules: Mapping[str, Any], wanted: list[str], found: list[str]) -> Iterator[str]:
    for name in [names] if isinstance(names, str) else names:
        one: Names = names if isinstance(names, str) else [name]
        out = matched(one, modules)
        if not out:
            yield f"exclude_modules: {name!r} matches no module of the model"
        elif not matched(one, wanted):
            within = next((n for n in found if n.startswith(tuple(f"{module}." for module in out))), None)
            if within is not None:
                yield (
                    f"exclude_modules: {name!r} matches {out[0]}, not what lies within: {within} gets an adapter; "
                    rf"the regular expression '.*{re.escape(name)}\..*' leaves that out"
                )


def _idle_layers(
    layers: Sequence[int], layers_pattern: Names | None, left: list[str], numbers: Mapping[str, int | None]
) -> Iterator[str]:
    if not numbers:
        yield "layers_to_transform: no effect, as all targets are named in full"
        return
    there = {layer_number(name, layers_pattern) for name in left}
    for number in dict.fromkeys(layers):
        if number not in there:
            yield f"layers_to_transform: no target lies in layer {number}"
    for name, taken in numbers.items():
        first, theirs = first_number(name), _passing_first_list(name)
        if not layers_pattern and theirs != first:
            read = "no layer number" if theirs is None else f"layer {theirs}"
            yield (
                f"layers_to_transform: HF PEFT reads {read} in {name}, and {taken} is taken here; "
                f"layers_pattern={name.partition('.')[0]!r} makes it {first} in both"
            )
            return
