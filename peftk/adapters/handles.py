"""Numbers for banks. A compiled graph holds no Python objects: its ops find a bank by its number, in every run."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftk.adapters.bank import AdapterBank, PackedBank

_count = itertools.count()
_banks: weakref.WeakValueDictionary[int, AdapterBank | PackedBank] = weakref.WeakValueDictionary()


def new(bank: AdapterBank | PackedBank) -> int:
    """The bank's number, which no other bank of this process has."""
    number = next(_count)
    _banks[number] = bank
    return number


def bank(number: int) -> AdapterBank | PackedBank:
    """The bank with this number. Raises RuntimeError if it is gone."""
    found = _banks.get(number)
    if found is None:
        raise RuntimeError(f"bank: expected the one that the graph was compiled with, number {number}, got none")
    return found
