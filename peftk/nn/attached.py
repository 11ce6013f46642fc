"""Adapters that hang on an existing module by forward hooks: the module keeps its class, attributes and own keys."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


class Attached(nn.Module):
    """An adapter that becomes a submodule, under `name`, of the module that it is attached to.

    Its hooks are bound methods: copy.deepcopy binds those of a copied module to the copied adapter, and pickle does
    the same. Hooks move with a module that another layer replaces (`peftk.nn.replace.take_place`), so `detach` looks
    for them in the whole of the module.
    """

    name = "adapter"
    hook_ids = 0  # above all of torch's numbers of this adapter's hooks

    def attach(self, module: nn.Module) -> None:
        """Hangs the adapter on `module`, whose outputs change only as far as the adapter changes them.

        Raises TypeError or ValueError where it cannot (a container, a module that has such an adapter); nothing has
        changed then.
        """
        attachable(module, self.name)
        hooks = self._hooks(module)
        module.add_module(self.name, self)
        handles = [register() for register in hooks]
        self.hook_ids = max([self.hook_ids, *(handle.id + 1 for handle in handles)])

    def detach(self, module: nn.Module) -> None:
        """Takes the adapter off again. Raises ValueError where it is not attached to `module`."""
        if module._modules.get(self.name) is not self:
            raise ValueError(f"module: expected one that this adapter is attached to, got {type(module).__name__}")
        for part in module.modules():
            for kind in _HOOKS:
                hooks = getattr(part, kind)
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[key]
                    for flag in _FLAGS:
                        if flag.startswith(kind):
                            getattr(part, flag).pop(key, None)
        del module._modules[self.name]

    def _hooks(self, module: nn.Module) -> list[Callable[[], RemovableHandle]]:
        """How to register the adapter's hooks on `module` and its parts, all of them found; may raise."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch numbers hooks from 0 in every process: one registered after unpickling must not take ours' place
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.hook_ids)


class Caught(threading.local):
    """What one hook of an adapter keeps for the next, in the same thread and the same call of the module.

    Nothing of it is in a copy, or in what pickle gives back.
    """

    kept: Any = None

    def take(self, before: str) -> Any:
        """What was kept, and is forgotten now. Raises RuntimeError where nothing was."""
        kept, self.kept = self.kept, None
        if kept is None:
            raise RuntimeError(f"adapter: expected {before} to be called before, got no call of it")
        return kept

    def __reduce__(self) -> tuple[type[Caught], tuple[()]]:
        return Caught, ()


def attachable(module: nn.Module, name: str) -> None:
    """Raises TypeError or ValueError unless an adapter can be hung on `module` as its submodule `name`."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    if isinstance(module, _CONTAINERS):
        raise TypeError(f"module: expected one that isn't a container of modules, got {type(module).__name__}")
    if hasattr(module, name):
        raise ValueError(f"module: expected a {type(module).__name__} without {name!r}, got one that has it")


def part(module: nn.Module, name: str) -> nn.Module:
    """The part `name` of a module, the module itself for "". Raises ValueError where there is none."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"module: expected a {type(module).__name__} with {name!r}, got one without") from None


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a module transforms: its first argument, `hidden_states` among named ones. Raises TypeError for another."""
    value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    if not isinstance(value, Tensor):
        raise TypeError(f"input: expected a tensor as the module's first argument, got {type(value).__name__}")
    return value


def first_output(output: Any) -> Tensor:
    """The hidden states among a module's outputs: the tensor, or the first of several."""
    value: Any = None
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list, Mapping)) and output:
        value = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"output: expected a tensor, or several of which it is the first, got {type(output).__name__}")
    return value


def with_first(output: Any, value: Tensor) -> Any:
    """`output` with another tensor for `first_output(output)`."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, Mapping):  # transformers' ModelOutput too
        key = next(iter(output))
        return _replaced(output, key, value)
    rest = (value, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


def _replaced(output: Any, key: str, value: Tensor) -> Any:
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{key: value})  # type: ignore[type-var]
    return type(output)({**output, key: value})
