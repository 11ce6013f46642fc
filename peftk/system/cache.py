"""What `peftk tune` keeps on disk: JSON files in one folder, an entry for each processor or GPU, with what it was made
with.

The folder is $PEFTK_CACHE_DIR, else peftk below $XDG_CACHE_HOME or ~/.cache. A file that is broken is ignored with a
warning, and not worth keeping when there is something new to write.
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
    """Raises OSError where no folder is named and the user has no home."""
    folder = os.environ.get("PEFTK_CACHE_DIR")
    if folder:
        return Path(folder, file)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "peftk", file)
    except RuntimeError as error:
        raise OSError("expected a home directory or PEFTK_CACHE_DIR, got neither") from error


def load(
    file: str, name: str, made_with: dict[str, str], parse: Callable[[dict[str, Any]], T], *, done: str, here: str
) -> tuple[T | None, str]:
    """What `parse` makes of an entry; or None, and why: it says what was not `done` on which machine (`here`)."""
    try:
        place = path(file)
    except OSError as error:
        return None, f"not {done} on this machine ({error})"
    try:
        entry = _read(place).get(name)
        if entry is None:
            return None, f"not {done} on this {here} (peftk tune)"
        if entry["made_with"] != made_with:
            return None, f"{done} with {entry['made_with']}, this is {made_with} (peftk tune again)"
        return parse(entry), ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{place}: expected what `peftk tune` writes, got {error!r}; ignored", stacklevel=2)
        return None, f"{place} cannot be read (peftk tune writes a new one)"


def save(file: str, name: str, made_with: dict[str, str], content: dict[str, Any]) -> None:
    """Writes an entry beside the others. Raises OSError where the folder cannot be written."""
    place = path(file)
    try:
        entries = _read(place)
    except ValueError:
        entries = {}  # not worth keeping
    time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    entries[name] = {"made_with": made_with, "time": time, **content}
    _write(place, entries)


def delete(file: str, name: str) -> bool:
    """Deletes an entry, and a file that cannot be read; whether there was something."""
    place = path(file)
    try:
        found = _read(place)
        existed = found.pop(name, None) is not None
        if existed:
            _write(place, found)
    except ValueError:
        place.unlink()
        existed = True
    return existed


def _read(place: Path) -> dict[str, Any]:
    entries = json.loads(place.read_text()) if place.exists() else {}
    if not isinstance(entries, dict):
        raise ValueError(f"expected a JSON object, got {type(entries).__name__}")
    return entries


def _write(place: Path, entries: dict[str, Any]) -> None:
    """All or nothing: another process may be reading."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=place.parent, suffix=".json", delete=False) as file:
        try:
            json.dump(entries, file, indent=1)
            file.close()
            os.replace(file.name, place)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
