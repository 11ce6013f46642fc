"""Checks for optional packages that a command needs, before it starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


class MissingExtraError(RuntimeError):
    """A command needs packages that are not installed; the message says how to install them."""


def require(extra: str, what: str, modules: Sequence[str]) -> None:
    """Raises MissingExtraError if one of `modules` is not installed. extra: the extra of peftk that installs them."""
    missing = [name for name in modules if not is_installed(name)]
    if missing:
        raise MissingExtraError(f"{what} needs {', '.join(missing)}, not installed here: pip install 'peftk[{extra}]'")


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
