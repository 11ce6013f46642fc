"""Weights that several modules of a model share, and which a change in place would change for all of them.

Tied embeddings, linears that hold one Parameter, views of one tensor, buffers: whatever of a module lies in the same
memory as what another holds (`peftk.system.memory`), whether adapters stand there or not. One module that stands in
several places is one module.
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
    """A Parameter that an operation on a layer changes. owner: the module of the layer, or the layer, that holds it."""

    layer: str
    module: nn.Module
    owner: nn.Module
    name: str


@dataclasses.dataclass(frozen=True)
class Shared:
    """Noted on a layer: another module holds the same memory as this Parameter, in `other`.

    whole: the module that holds the Parameter stands there itself, so that no copy of the Parameter parts the two.
    """

    name: str
    parameter: nn.Parameter
    other: str
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Tie:
    """The Parameter that a module held, and shared, before it got a copy of its own."""

    owner: nn.Module
    name: str
    parameter: nn.Parameter


def conflicts(model: nn.Module, places: Sequence[Place]) -> list[tuple[Place, str]]:
    """The places that lie in memory which a module outside of their layer holds, too, and one such tensor's name."""
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


def elsewhere(model: nn.Module, places: Sequence[Place]) -> list[tuple[Place, str]]:
    """The places whose owner, a module within a layer, stands outside of it too, and the Parameter's name there."""
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
    """The tensors of the module itself: Parameters, buffers, attributes, and what lies in lists and dicts there."""
    for attribute, value in module.__dict__.items():
        if isinstance(value, Tensor):
            yield attribute, value
        elif isinstance(value, dict):
            yield from ((str(key), one) for key, one in value.items() if isinstance(one, Tensor))
        elif isinstance(value, (list, tuple)):
            yield from ((attribute, one) for one in value if isinstance(one, Tensor))


def note(model: nn.Module, places: Sequence[Place]) -> None:
    """Leaves with each layer what it shares, so that it knows by itself, without the model; what was noted goes."""
    for place in places:
        place.module.__dict__.pop(_NOTED, None)
    for place, other in conflicts(model, places):
        noted = place.module.__dict__.setdefault(_NOTED, [])
        noted.append(Shared(place.name, getattr(place.owner, place.name), other))
    for place, other in elsewhere(model, places):
        noted = place.module.__dict__.setdefault(_NOTED, [])
        noted.append(Shared(place.name, getattr(place.owner, place.name), other, whole=True))


def refuse_noted(layer: nn.Module, names: Sequence[str] = ("weight",), *, untie: bool = False) -> None:
    """Raises ValueError where one of the layer's Parameters of these names was noted as shared, and is there still.

    untie: the layer is to get copies, so only what copies cannot part is refused.
    """
    for shared in layer.__dict__.get(_NOTED, ()):
        if shared.name in names and any(shared.parameter is parameter for parameter in layer.parameters()):
            if shared.whole:
                raise ValueError(two_places(shared.name, shared.other))
            if not untie:
                raise ValueError(message(shared.name, shared.other))


def two_places(name: str, other: str) -> str:
    return f"{name}: expected that of a module in one place of the model, got one that is {other} too"


def message(name: str, other: str) -> str:
    return (
        f"{name}: expected one that no other module holds, as this changes it in place, got one that is {other} too; "
        "untie=True gives the layer a copy of its own first"
    )


def untie(owner: nn.Module, name: str) -> Tie:
    """Gives a module a copy of one of its Parameters. Raises MemoryError and such before anything has changed."""
    before = owner._parameters[name]
    assert before is not None
    with lasting():
        own = nn.Parameter(before.detach().clone(), requires_grad=before.requires_grad)
    owner._parameters[name] = own
    return Tie(owner, name, before)


def put_back(tie: Tie) -> None:
    tie.owner._parameters[tie.name] = tie.parameter


def retie(tie: Tie) -> None:
    """Gives a module the Parameter again that it shared before, where that has the very bits of its own."""
    own = tie.owner._parameters[tie.name]
    if own is not None and same_bits(own, tie.parameter):
        put_back(tie)
