"""Compares a stub file with its compiled module: the names, and every function's arguments."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tests.support.paths import ROOT


def differences(module: ModuleType) -> list[str]:
    """The differences between the stub of `peftk.<module>` and the module, in words; empty if there are none."""
    name = module.__name__.rpartition(".")[2]
    stub = ast.parse(Path(ROOT, "peftk", f"{name}.pyi").read_text())
    return list(_differences(stub.body, module, name))


def _differences(body: list[ast.stmt], scope: object, where: str) -> Iterator[str]:
    declared = {_name(node): node for node in body if _name(node)}
    there = {name for name in vars(scope) if not name.startswith("_")}
    yield from (f"{where}.{name}: not in the module" for name in declared.keys() - there)
    yield from (f"{where}.{name}: not in the stub" for name in there - declared.keys())
    for name in declared.keys() & there:
        node, here = declared[name], f"{where}.{name}"
        if isinstance(node, ast.ClassDef):
            yield from _differences(node.body, getattr(scope, name), here)
        elif isinstance(node, ast.FunctionDef) and not isinstance(vars(scope)[name], property):
            said, has = _said(node), _has(getattr(scope, name))
            if said != has:
                yield f"{here}: {said} in the stub, {has} in the module"


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    return node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else None


def _said(node: ast.FunctionDef) -> list[str]:
    """The arguments in a stub: names, defaults, * and /."""
    return ast.unparse(_without_types(node.args)).split(", ")


def _without_types(arguments: ast.arguments) -> ast.arguments:
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    if arguments.vararg:
        arguments.vararg.annotation = None
    return arguments


def _has(function: object) -> list[str]:
    try:
        return str(inspect.signature(function)).strip("()").split(", ")  # type: ignore[arg-type]
    except ValueError:  # pybind11 writes the arguments into the docstring, with types
        first = (function.__doc__ or "").partition("\n")[0].partition(" -> ")[0]
        return re.findall(r"[(,] ?(\w+):", first) or [""]
