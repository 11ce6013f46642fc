"""Makes any chosen function call within an operation fail, to test that the operation leaves everything unchanged."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import peftk
from peftk.system import interrupts

OURS = str(pathlib.Path(peftk.__file__).parent)
ERRORS = (MemoryError, KeyboardInterrupt, RuntimeError)
_SIGNALS = interrupts.__file__  # defers signals to the end, so it must not fail
_PLAIN = (str, int, float, bool, type(None))
_GENERATOR = 0x20  # in a code object's flags


class Calls:
    """The number of calls of functions in the folders, and the name of the function that failed."""

    def __init__(self) -> None:
        self.count = 0
        self.failed: str | None = None


@contextlib.contextmanager
def failing(at: int | None, error: type[BaseException], folders: tuple[str, ...] = (OURS,)) -> Iterator[Calls]:
    """Inside, the at-th call of a function in these folders raises `error` (None: none does). Generators count once."""
    calls = Calls()

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if calls.failed is None and code.co_filename.startswith(folders) and code.co_filename != _SIGNALS:
            if code.co_flags & _GENERATOR and frame.f_lasti > 4:
                return  # a generator that continues
            calls.count += 1
            if calls.count == at:
                calls.failed = f"{code.co_filename}:{code.co_firstlineno} {code.co_name}"
                raise error("made to fail")

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield calls
    finally:
        sys.settrace(before)


def count(action: Callable[[], object], folders: tuple[str, ...] = (OURS,)) -> int:
    with failing(None, MemoryError, folders) as calls:
        action()
    return calls.count


def everything(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an operation could change: modules, attributes, hooks, and the bits of tensors."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state[name] = (id(module), type(module), {key: _plain(value) for key, value in module.__dict__.items()})
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        value = tensor.detach().contiguous().view(torch.uint8).tolist()
        state[f"{name}:"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, value)
    return state


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, Tensor):
        return [_plain(one) for one in value]
    return set(value) if isinstance(value, set) else id(value)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]
