"""Adapters attached to an existing module by forward hooks: the module keeps its class, attributes and own keys."""

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
    """Base class of adapters that become a submodule, called `name`, of the module that they are attached to.

    The hooks are bound methods, so copy.deepcopy and pickle bind the hooks of a copied module to the copied adapter.
    When another layer replaces a hooked module, the hooks move with it (`peftk.nn.replace.take_place`), so `detach`
    searches the module and all its submodules for them.
    """

    name = "adapter"
    hook_ids = 0  # greater than the id that torch gave to any of this adapter's hooks

    def attach(self, module: nn.Module) -> None:
        """Attaches the adapter to `module`. A new adapter leaves the module's outputs as they were.

        Raises TypeError or ValueError if that is not possible (a container, or a module that already has such an
        adapter). The module is unchanged then.
        """
        check_attachable(module, self.name)
        hooks = self._hooks(module)
        module.add_module(self.name, self)
        handles = [register() for register in hooks]
        self.hook_ids = max([self.hook_ids, *(handle.id + 1 for handle in handles)])

    def detach(self, module: nn.Module) -> None:
        """Removes the adapter and its hooks. Raises ValueError if it is not attached to `module`."""
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
        """Functions that register the adapter's hooks on `module` and its submodules.

        Raises ValueError if a submodule is missing, so that nothing is registered then.
        """
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch numbers hooks from 0 in every process: a hook registered after unpickling must not overwrite ours
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.hook_ids)


class HookState(threading.local):
    """What one hook of an adapter passes to the next, in the same thread and the same call of the module.

    Copies and unpickled objects start empty.
    """

    kept: Any = None

    def take(self, before: str) -> Any:
        """Returns the value and clears it. Raises RuntimeError if there is none; before: the submodule that sets it."""
        kept, self.kept = self.kept, None
        if kept is None:
            raise RuntimeError(f"adapter: expected {before} to be called first, got no call of it")
        return kept

    def __reduce__(self) -> tuple[type[HookState], tuple[()]]:
        return HookState, ()


def check_attachable(module: nn.Module, name: str) -> None:
    """Raises TypeError or ValueError unless an adapter can be attached to `module` as its submodule `name`."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    if isinstance(module, _CONTAINERS):
        raise TypeError(f"module: expected one that isn't a container of modules, got {type(module).__name__}")
    if hasattr(module, name):
        raise ValueError(f"module: expected a {type(module).__name__} without {name!r}, got one that has it")


def submodule(module: nn.Module, name: str) -> nn.Module:
    """The submodule `name`; for "" the module itself. Raises ValueError if there is none."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"module: expected a {type(module).__name__} with {name!r}, got one without") from None


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a module transforms: its first positional argument, else `hidden_states`, else the first keyword.

    Raises TypeError if that is not a tensor.
    """
    value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    if not isinstance(value, Tensor):
        raise TypeError(f"input: expected a tensor as the module's first argument, got {type(value).__name__}")
    return value


def first_output(output: Any) -> Tensor:
    """The hidden states among a module's outputs: the tensor, or the first of several.

    Raises TypeError if that is not a tensor.
    """
    value: Any = None
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list, Mapping)) and output:
        value = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if not isinstance(value, Tensor):
        raise TypeError(
            f"output: expected a tensor, or a tuple or dict that begins with one, got {type(output).__name__}"
        )
    return value


def replace_first_output(output: Any, value: Tensor) -> Any:
    """`output` with `value` in place of `first_output(output)`."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, Mapping):  # includes transformers' ModelOutput
        key = next(iter(output))
        return _replaced(output, key, value)
    rest = (value, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


def _replaced(output: Any, key: str, value: Tensor) -> Any:
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{key: value})  # type: ignore[type-var]
    return type(output)({**output, key: value})
