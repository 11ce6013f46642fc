"""Which modules of a model a config means: names, regular expressions, "all-linear", layer numbers. As HF PEFT's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peftk.methods.plan import trained_in_place
from peftk.methods.trial import seen
from peftk.nn.attached import Attached
from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.replace import is_linear, replaceable

ALL_LINEAR = "all-linear"
Names = str | Sequence[str]


def check_names(field: str, names: Any, *, keyword: str | None = None) -> None:
    """Raises ValueError unless it is a non-empty list of names or a regular expression (or the keyword)."""
    also = "" if keyword is None else f" or {keyword!r}"
    if isinstance(names, str) and names:
        check_regex(field, names)
    elif not isinstance(names, Sequence) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{field}: expected names, a regular expression{also}, got {names!r}")


def check_layers(field: str, numbers: Any) -> None:
    if isinstance(numbers, str) or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
        raise ValueError(f"{field}: expected layer numbers of 0 or more, got {numbers!r}")


def check_regex(field: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{field}: expected a regular expression, got {pattern!r} ({error})") from error


def matches(names: Names, module: str) -> bool:
    """A string is a regular expression that matches the dotted name whole; a list holds names that end it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def inside(module: str, name: str) -> bool:
    """Whether a module is, or lies within, one whose dotted name ends with `name`."""
    return f".{name}." in f".{module}."


def layer_number(module: str, layers_pattern: Names | None = None) -> int | None:
    """The number of the layer that a module lies in: the first one in its name, or the one behind `layers_pattern`.

    PEFT's rule: `encoder.layer.3.attention.self.query` lies in layer 3.
    """
    patterns = (
        ["[^.]+"] if not layers_pattern else [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    )
    for pattern in patterns:
        found = re.search(rf"(?:^|\.)(?:{pattern})\.(?P<number>\d+)\.", module)
        if found is not None:
            return int(found["number"])
    return None


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear that is not a peftk layer yet, by each name under which it is reached."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module):
            found[name] = module
    return found


def target_linears(
    model: nn.Module,
    target_modules: Names,
    *,
    exclude_modules: Names | None = None,
    layers_to_transform: Sequence[int] | None = None,
    layers_pattern: Names | None = None,
    modules_to_save: Sequence[str] = (),
) -> dict[str, nn.Module]:
    """The linears to replace, by name; every name under which one is reached.

    Raises ValueError or TypeError where nothing matches, or where one that matches cannot be replaced.
    """
    candidates = linears(model)
    if target_modules == ALL_LINEAR:
        head = _output_embedding(model)
        whole = trained_in_place(model)
        reader = seen(model).reader
        found = {n: m for n, m in candidates.items() if m is not head and id(m.weight) not in whole and not reader(m)}
    else:
        found = {n: m for n, m in candidates.items() if matches(target_modules, n)}
        taken = [n for n, m in model.named_modules() if isinstance(m, FrozenLinear) and matches(target_modules, n)]
        if taken and not found:
            raise ValueError(f"target_modules: expected linears, got {taken[0]}, which a method has replaced already")
    if exclude_modules is not None:
        found = {n: m for n, m in found.items() if not matches(exclude_modules, n)}
    if layers_to_transform is not None:
        # a name given in full is meant wherever it lies
        full = () if isinstance(target_modules, str) else target_modules
        found = {n: m for n, m in found.items() if n in full or layer_number(n, layers_pattern) in layers_to_transform}
    # what trains whole gets no adapter besides
    found = {n: m for n, m in found.items() if not any(inside(n, kept) for kept in modules_to_save)}
    if not found:
        names = ", ".join(list(candidates)[:8]) or "none"
        raise ValueError(
            f"target_modules: expected to match some linear of the model ({names}, …), got {target_modules!r}"
        )
    if "" in found:
        raise ValueError("model: expected a module that contains linears, got an nn.Linear; use LoRALinear.from_linear")
    for name, linear in found.items():
        replaceable(linear)
        called(model, "target_modules", name)
    return found


def called(model: nn.Module, field: str, name: str) -> None:
    """Raises ValueError where that is a linear whose weight the model reads, and which it does not call."""
    module = model.get_submodule(name)
    reader = seen(model).reader(module) if is_linear(module) else None
    if reader is not None:
        raise ValueError(f"{field}: expected linears that are called, got {name}, whose weight {reader} reads itself")


def target_modules(model: nn.Module, field: str, names: Names) -> dict[str, nn.Module]:
    """Any modules that are meant, by name, each once, but adapters. Raises ValueError where nothing matches."""
    adapters = [name for name, module in model.named_modules() if isinstance(module, Attached)]
    found = {
        name: module
        for name, module in model.named_modules()
        if name and matches(names, name) and not any(f"{name}.".startswith(f"{adapter}.") for adapter in adapters)
    }
    if not found:
        some = ", ".join([n for n, _ in model.named_modules() if n][:8])
        raise ValueError(f"{field}: expected to match some module of the model ({some}, …), got {names!r}")
    return found


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the module's name from a dot on."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None
