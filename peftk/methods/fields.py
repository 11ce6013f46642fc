"""What the fields of configs may hold, whatever the method: each is checked, and brought to one form that JSON holds.

A list, tuple, set, frozenset, the keys of a dict or a range all say the same; a set is put in order. numpy's numbers
become Python's.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Collection, Mapping, Set
from typing import Any

Names = str | Collection[str]


def settle(config: Any, **fields: Any) -> None:
    """Gives fields of a frozen config, in its __post_init__, the form that was made of them."""
    for name, value in fields.items():
        object.__setattr__(config, name, value)


def names(field: str, value: Any, *, keyword: str | None = None) -> str | tuple[str, ...]:
    """A regular expression (or the keyword, in any case), or names in a tuple. Raises ValueError for all else."""
    if isinstance(value, str) and value:
        if keyword is not None and value.lower() == keyword:
            return keyword
        regex(field, value)
        return str(value)
    also = "" if keyword is None else f" or {keyword!r}"
    found = _listed(value)
    if not found or not all(isinstance(name, str) and name for name in found):
        raise ValueError(f"{field}: expected names, a regular expression{also}, got {value!r}")
    return tuple(sorted(map(str, found)) if isinstance(value, Set) else map(str, found))


def optional_names(field: str, value: Any) -> str | tuple[str, ...] | None:
    """`names`, or None for None and for nothing at all, which PEFT takes for None."""
    nothing = value is None or (value == "" if isinstance(value, str) else _listed(value) == [])
    return None if nothing else names(field, value)


def optional_list(field: str, value: Any) -> tuple[str, ...] | None:
    """`optional_names` that are no regular expression."""
    found = optional_names(field, value) if not isinstance(value, str) else value
    if isinstance(found, str):
        raise ValueError(f"{field}: expected a list of names, got {value!r}")
    return found


def layer_numbers(field: str, value: Any) -> tuple[int, ...]:
    """Numbers of layers in a tuple; one number is one layer. Raises ValueError for all else."""
    found = [value] if isinstance(value, numbers.Integral) else _listed(value)
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
    """An integer of 1 or more. Raises ValueError for all else."""
    if not _is(numbers.Integral, value) or value < 1:
        raise ValueError(f"{field}: expected an integer of 1 or more, got {value!r}")
    return int(value)


def number(field: str, value: Any) -> float:
    """A finite number; integers stay integers. Raises ValueError for all else."""
    if not _is(numbers.Real, value) or not _finite(value):
        raise ValueError(f"{field}: expected a finite number, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def above_zero(field: str, value: Any) -> float:
    """A finite number above 0. Raises ValueError for all else."""
    if not _is(numbers.Real, value) or not _finite(value) or not value > 0:
        raise ValueError(f"{field}: expected a number above 0, got {value!r}")
    return number(field, value)


def flag(field: str, value: Any) -> bool:
    """True or False. Raises ValueError for all else."""
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's is called either
        raise ValueError(f"{field}: expected True or False, got {value!r}")
    return bool(value)


def regex(field: str, pattern: Any) -> None:
    """Raises ValueError unless it is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{field}: expected a regular expression, got {pattern!r} ({error})") from error


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _listed(value: Any) -> list[Any] | None:
    """The elements of a collection, None for all else: a mapping says more than its keys, a string is no list."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
        return None
    return list(value)
