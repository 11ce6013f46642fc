"""Checks the fields of configs, for all methods, and converts them to one form that JSON can hold.

Lists, tuples, sets, frozensets, keys of dicts and ranges are equivalent; a set is sorted. numpy's numbers become
Python's.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Collection, Mapping, Set
from typing import Any

Names = str | Collection[str]


def set_fields(config: Any, **fields: Any) -> None:
    """Sets fields of a frozen config, in its __post_init__."""
    for name, value in fields.items():
        object.__setattr__(config, name, value)


def names(field: str, value: Any, *, keyword: str | None = None) -> str | tuple[str, ...]:
    """A regular expression, or the keyword (in any case), or a tuple of names. Raises ValueError for anything else."""
    if isinstance(value, str) and value:
        if keyword is not None and value.lower() == keyword:
            return keyword
        regex(field, value)
        return str(value)
    also = "" if keyword is None else f" or {keyword!r}"
    found = _as_list(value)
    if not found or not all(isinstance(name, str) and name for name in found):
        raise ValueError(f"{field}: expected names, a regular expression{also}, got {value!r}")
    return tuple(sorted(map(str, found)) if isinstance(value, Set) else map(str, found))


def optional_names(field: str, value: Any) -> str | tuple[str, ...] | None:
    """`names`, or None for None and for an empty value, as in PEFT."""
    empty = value is None or (value == "" if isinstance(value, str) else _as_list(value) == [])
    return None if empty else names(field, value)


def optional_list(field: str, value: Any) -> tuple[str, ...] | None:
    """`optional_names`, but raises ValueError for a regular expression."""
    found = optional_names(field, value) if not isinstance(value, str) else value
    if isinstance(found, str):
        raise ValueError(f"{field}: expected a list of names, got {value!r}")
    return found


def layer_numbers(field: str, value: Any) -> tuple[int, ...]:
    """A tuple of layer numbers; a single number is one layer. Raises ValueError for anything else."""
    found = [value] if isinstance(value, numbers.Integral) else _as_list(value)
    try:
        if found is None or any(isinstance(number, bool) for number in found):
            raise TypeError
        result = tuple(number.__index__() for number in found)
    except (AttributeError, TypeError):
        result = (-1,)
    if any(number < 0 for number in result):
        raise ValueError(f"{field}: expected layer numbers of 0 or more, got {value!r}")
    return tuple(sorted(result)) if isinstance(value, Set) else result


def count(field: str, value: Any) -> int:
    """An integer of 1 or more. Raises ValueError for anything else."""
    if not _is_real_number(numbers.Integral, value) or value < 1:
        raise ValueError(f"{field}: expected an integer of 1 or more, got {value!r}")
    return int(value)


def number(field: str, value: Any) -> float:
    """A finite number; integers stay integers. Raises ValueError for anything else."""
    if not _is_real_number(numbers.Real, value) or not _is_finite(value):
        raise ValueError(f"{field}: expected a finite number, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def positive(field: str, value: Any) -> float:
    """A finite number above 0. Raises ValueError for anything else."""
    if not _is_real_number(numbers.Real, value) or not _is_finite(value) or not value > 0:
        raise ValueError(f"{field}: expected a number above 0, got {value!r}")
    return number(field, value)


def flag(field: str, value: Any) -> bool:
    """True or False. Raises ValueError for anything else."""
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's bool has either name
        raise ValueError(f"{field}: expected True or False, got {value!r}")
    return bool(value)


def regex(field: str, pattern: Any) -> None:
    """Raises ValueError unless it is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{field}: expected a regular expression, got {pattern!r} ({error})") from error


def _is_real_number(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _as_list(value: Any) -> list[Any] | None:
    """The elements of a collection; None for anything else, including mappings and strings."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
        return None
    return list(value)
