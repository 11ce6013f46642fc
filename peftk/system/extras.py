"""Packages that only some commands need: asked for once, up front, with the command that installs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


class MissingExtraError(RuntimeError):
    """A command needs packages that are not installed; the message names the command that installs them."""


def require(extra: str, what: str, modules: Sequence[str]) -> None:
    """Raises MissingExtraError where one of `modules` cannot be found."""
    missing = [name for name in modules if not installed(name)]
    if missing:
        raise MissingExtraError(f"{what} needs {', '.join(missing)}, not installed here: pip install 'peftk[{extra}]'")


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
