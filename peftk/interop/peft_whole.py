"""Makes HF PEFT's operations on a model's layers atomic: they change all layers or none."""

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
    """If anything is raised inside, restores the modules in `model` and their attributes.

    The values of tensors are not restored; callbacks on the stack must undo changes of these. A Ctrl-C is deferred
    until the end, or until it is delivered between two layers (`interrupts.Held.deliver`).
    """
    with interrupts.deferred(), contextlib.ExitStack() as undo:
        for module in model.modules():
            undo.callback(_restore, module, type(module), _copies(module))
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        yield undo
        undo.pop_all()


def atomic(method: Method) -> Method:
    """Wraps a method of a PEFT model so that it changes all layers or, if it raises, none."""

    @functools.wraps(method)
    def all_layers(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with all_or_none(self):
            return method(self, *args, **kwargs)

    return all_layers  # type: ignore[return-value]


def _copies(module: nn.Module) -> list[tuple[Any, Any]]:
    """Copies of the module's attributes and of the containers among them (children, Parameters, hooks, …)."""
    attributes = module.__dict__
    return [
        (container, container.copy())
        for container in (attributes, *attributes.values())
        if isinstance(container, (dict, list, set))
    ]


def _restore(module: nn.Module, kind: type[nn.Module], copies: list[tuple[Any, Any]]) -> None:
    module.__class__ = kind
    for container, before in copies:
        container.clear()
        container.extend(before) if isinstance(container, list) else container.update(before)
