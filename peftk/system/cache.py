"""The JSON files in which `peftk tune` keeps its results: an entry per processor or GPU, with the versions it is for.

The folder is $PEFTK_CACHE_DIR, else $XDG_CACHE_HOME/peftk or ~/.cache/peftk. A broken file is ignored with a warning,
and replaced by the next write.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def path(file: str) -> Path:
    """The path of a file in the cache. Raises OSError if PEFTK_CACHE_DIR is not set and the user has no home."""
    folder = os.environ.get("PEFTK_CACHE_DIR")
    if folder:
        return Path(folder, file)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "peftk", file)
    except RuntimeError as error:
        raise OSError("expected a home directory or PEFTK_CACHE_DIR, got neither") from error


def load(
    file: str, name: str, made_with: dict[str, str], parse: Callable[[dict[str, Any]], T], *, verb: str, unit: str
) -> tuple[T | None, str]:
    """The entry `name` as returned by `parse`, and an empty string; or None, and the reason.

    made_with: the versions for which the entry must have been made. verb, unit: words for the reason, as in "not
    measured (verb) on this machine (unit)".
    """
    try:
        file_path = path(file)
    except OSError as error:
        return None, f"not {verb} on this machine ({error})"
    try:
        entry = _read(file_path).get(name)
        if entry is None:
            return None, f"not {verb} on this {unit} (peftk tune)"
        if entry["made_with"] != made_with:
            return None, f"{verb} with {entry['made_with']}, this is {made_with} (peftk tune again)"
        return parse(entry), ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{file_path}: expected what `peftk tune` writes, got {error!r}; ignored", stacklevel=2)
        return None, f"{file_path} cannot be read (peftk tune writes a new one)"


def save(file: str, name: str, made_with: dict[str, str], content: dict[str, Any]) -> None:
    """Writes an entry and keeps the others. Raises OSError if the folder cannot be written."""
    file_path = path(file)
    try:
        entries = _read(file_path)
    except ValueError:
        entries = {}  # a broken file
    time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    entries[name] = {"made_with": made_with, "time": time, **content}
    _write(file_path, entries)


def delete(file: str, name: str) -> bool:
    """Deletes an entry, or the whole file if it is broken. Returns whether there was anything to delete."""
    file_path = path(file)
    try:
        entries = _read(file_path)
        existed = entries.pop(name, None) is not None
        if existed:
            _write(file_path, entries)
    except ValueError:
        file_path.unlink()
        existed = True
    return existed


def _read(file_path: Path) -> dict[str, Any]:
    entries = json.loads(file_path.read_text()) if file_path.exists() else {}
    if not isinstance(entries, dict):
        raise ValueError(f"expected a JSON object, got {type(entries).__name__}")
    return entries


def _write(file_path: Path, entries: dict[str, Any]) -> None:
    """Replaces the file atomically, because another process may be reading it."""
    file_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file_path.parent, suffix=".json", delete=False) as file:
        try:
            json.dump(entries, file, indent=1)
            file.close()
            os.replace(file.name, file_path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
