"""Finds weights that several modules of a model share: changing one in place would change it for all of them.

These are tied embeddings, linears that hold the same Parameter, views of one tensor, buffers: any tensor of a module in
the same memory as a tensor of another (`peftk.system.memory`), with or without adapters there. A module that is used in
several places of the model counts as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from peftk.reference.receipt import same_bits
from peftk.system import memory
from peftk.system.lasting import lasting

_NOTED = "_peftk_shared"


@dataclasses.dataclass(frozen=True)
class Place:
    """A Parameter that an operation on a layer changes.

    layer: the layer's name. module: the layer. owner: the module that holds the Parameter, the layer or a submodule of
    it. name: the Parameter's name in its owner.
    """

    layer: str
    module: nn.Module
    owner: nn.Module
    name: str


@dataclasses.dataclass(frozen=True)
class Shared:
    """A note on a layer: the tensor called `other` in the model has the same memory as this Parameter.

    whole: the module that holds the Parameter is itself used there, so a copy of the Parameter does not separate them.
    """

    name: str
    parameter: nn.Parameter
    other: str
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Tie:
    """The shared Parameter that a module held before it got a copy of its own."""

    owner: nn.Module
    name: str
    parameter: nn.Parameter


def conflicts(model: nn.Module, places: Sequence[Place]) -> list[tuple[Place, str]]:
    """The places whose memory a module outside of their layer also holds, each with the name of one such tensor."""
    tensors = [
        (path, module, name, tensor) for path, module in model.named_modules() for name, tensor in _tensors_of(module)
    ]
    wanted = {(id(place.owner), place.name): place for place in places}
    found: dict[int, tuple[Place, str]] = {}
    for pair in memory.overlapping([tensor for *_, tensor in tensors]):
        for (_, owner, name, _), (path, other, other_name, _) in (
            map(tensors.__getitem__, p) for p in (pair, pair[::-1])
        ):
            place = wanted.get((id(owner), name))
            if place is not None and not any(module is other for module in place.module.modules()):
                found.setdefault(id(place), (place, f"{path}.{other_name}".lstrip(".")))
    return list(found.values())


def used_elsewhere(model: nn.Module, places: Sequence[Place]) -> list[tuple[Place, str]]:
    """The places whose owner, a submodule of a layer, is also used outside of it, with the Parameter's name there."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    found = []
    for place in places:
        layers = tuple(f"{path}." for path in paths.get(id(place.module), ()))
        outside = [path for path in paths.get(id(place.owner), ()) if not path.startswith(layers)]
        if place.owner is not place.module and outside:
            found.append((place, f"{outside[0]}.{place.name}"))
    return found


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own tensors: Parameters, buffers, attributes, and those in its lists and dicts."""
    for attribute, value in module.__dict__.items():
        if isinstance(value, Tensor):
            yield attribute, value
        elif isinstance(value, dict):
            yield from ((str(key), item) for key, item in value.items() if isinstance(item, Tensor))
        elif isinstance(value, (list, tuple)):
            yield from ((attribute, item) for item in value if isinstance(item, Tensor))


def note(model: nn.Module, places: Sequence[Place]) -> None:
    """Notes on each layer what it shares, so that it can refuse without the model. Earlier notes are dropped."""
    for place in places:
        place.module.__dict__.pop(_NOTED, None)
    for place, other in conflicts(model, places):
        noted = place.module.__dict__.setdefault(_NOTED, [])
        noted.append(Shared(place.name, getattr(place.owner, place.name), other))
    for place, other in used_elsewhere(model, places):
        noted = place.module.__dict__.setdefault(_NOTED, [])
        noted.append(Shared(place.name, getattr(place.owner, place.name), other, whole=True))


def check_not_shared(layer: nn.Module, names: Sequence[str] = ("weight",), *, untie: bool = False) -> None:
    """Raises ValueError if the layer still has a Parameter of these names that was noted as shared.

    untie: the layer will get copies, so only what copies cannot separate is refused.
    """
    for shared in layer.__dict__.get(_NOTED, ()):
        if shared.name in names and any(shared.parameter is parameter for parameter in layer.parameters()):
            if shared.whole:
                raise ValueError(shared_module_error(shared.name, shared.other))
            if not untie:
                raise ValueError(shared_memory_error(shared.name, shared.other))


def shared_module_error(name: str, other: str) -> str:
    return f"{name}: expected that of a module used in one place of the model, got one that is also {other}"


def shared_memory_error(name: str, other: str) -> str:
    return (
        f"{name}: expected one that no other module holds, as this changes it in place, got one that is also {other}; "
        "untie=True gives the layer a copy of its own first"
    )


def untie(owner: nn.Module, name: str) -> Tie:
    """Replaces one of a module's Parameters by a copy. If the copy fails (out of memory), nothing has changed."""
    before = owner._parameters[name]
    assert before is not None
    with lasting():
        copy = nn.Parameter(before.detach().clone(), requires_grad=before.requires_grad)
    owner._parameters[name] = copy
    return Tie(owner, name, before)


def put_back(tie: Tie) -> None:
    tie.owner._parameters[tie.name] = tie.parameter


def retie(tie: Tie) -> None:
    """Gives a module its shared Parameter back, if that has the same bits as the module's copy."""
    copy = tie.owner._parameters[tie.name]
    if copy is not None and same_bits(copy, tie.parameter):
        put_back(tie)
