"""Replaces a module's functions, wherever they are used, by those of a mutant of its source."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from unittest import mock

from triton.runtime.interpreter import InterpretedFunction


@contextlib.contextmanager
def mutant(module: ModuleType, *changes: tuple[str, str]) -> Iterator[None]:
    """Inside, every module of this process that uses functions or kernels of `module` uses those of its mutant.

    changes: (text, replacement); each text must be found exactly once. Only functions are replaced: classes and the
    module's data remain.
    """
    source = Path(module.__file__).read_text()
    for text, replacement in changes:
        found = source.count(text)
        assert found == 1, f"{module.__name__} has {found} times, not once: {text!r}"
        source = source.replace(text, replacement)
    with contextlib.ExitStack() as stack:
        # Triton reads the source of a kernel from its file. The name keeps relative imports working.
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        file = Path(folder, Path(module.__file__).name)
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(f"{module.__name__}_mutant", file)
        mutated = importlib.util.module_from_spec(spec)
        stack.enter_context(mock.patch.dict(sys.modules, {spec.name: mutated}))
        spec.loader.exec_module(mutated)
        originals = {}
        for name, value in vars(module).items():
            own = getattr(value, "fn", value)  # a kernel's Python function
            if getattr(own, "__module__", None) != module.__name__:
                continue
            if isinstance(value, FunctionType | InterpretedFunction):
                originals[id(value)] = getattr(mutated, name)
            elif isinstance(value, type):
                setattr(mutated, name, value)
        for user in list(sys.modules.values()):
            if user is mutated or not user.__name__.startswith(("peftk", "tests")):
                continue
            for name, value in list(vars(user).items()):
                if id(value) in originals:
                    stack.enter_context(mock.patch.object(user, name, originals[id(value)]))
        yield
