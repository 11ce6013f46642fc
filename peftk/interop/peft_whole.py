"""Operations of HF PEFT over the layers of a model, which PEFT does layer by layer: of all of them, or of none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from peftk.system import interrupts

Method = TypeVar("Method", bound=Callable[..., Any])


@contextlib.contextmanager
def all_or_none(model: nn.Module) -> Iterator[contextlib.ExitStack]:
    """Whatever is raised inside, modules below `model` and their attributes are then what they were before.

    That is all but the values of tensors, whose changes inside are for the stack to undo. A Ctrl-C waits until the end,
    or until somebody lets it come between two layers (`interrupts.Held.deliver`).
    """
    with interrupts.deferred(), contextlib.ExitStack() as undo:
        for module in model.modules():
            undo.callback(_put_back, module, type(module), _copies(module))
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        yield undo
        undo.pop_all()


def whole(method: Method) -> Method:
    """A method of a PEFT model that changes all its layers or, where it raises, none."""

    @functools.wraps(method)
    def all_layers(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with all_or_none(self):
            return method(self, *args, **kwargs)

    return all_layers  # type: ignore[return-value]


def _copies(module: nn.Module) -> list[tuple[Any, Any]]:
    """The module's attributes, and the containers among them (its children, Parameters and hooks, too), as they are."""
    attributes = module.__dict__
    return [
        (container, container.copy())
        for container in (attributes, *attributes.values())
        if isinstance(container, (dict, list, set))
    ]


def _put_back(module: nn.Module, kind: type[nn.Module], copies: list[tuple[Any, Any]]) -> None:
    module.__class__ = kind
    for container, before in copies:
        container.clear()
        container.extend(before) if isinstance(container, list) else container.update(before)
