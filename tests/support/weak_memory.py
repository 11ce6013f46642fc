"""Memory as the programs of one launch see it: a store is visible only to programs that are ordered after it.

Each program has a vector clock with two parts. A plain store is made by all threads of a block: its own program knows
it from the next barrier on, and barriers count it. An atomic on one address is made by one thread: its program knows it
at once, and atomics count it. A release writes what the program knows to the address that it acts on; an acquire takes
over what is written there; a read-modify-write in between keeps it (PTX's observation order through RMWs). So a store
reaches another program by store, barrier, release and acquire, and further programs in the same way.

Everything stored is in the real memory at once, in the order of execution. Older values are kept in addition, for
programs that may still read them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class _Write(NamedTuple):
    bits: np.unsignedinteger
    part: int  # index in the clocks, and
    time: int  # the count there from which on a program knows this write; -1: all know it
    by: int


class Clock:
    """What a program knows, and its own time."""

    def __init__(self, program: int, programs: int) -> None:
        self.program = program
        self.block, self.thread = program, programs + program  # the program's own two indices in `knows`
        self.knows = np.zeros(2 * programs, np.int64)

    def barrier(self) -> None:
        self.knows[self.block] += 1

    def sees(self, write: _Write) -> bool:
        return write.time < 0 or self.knows[write.part] >= write.time


class WeakMemory:
    def __init__(self, mode: str, chance: random.Random, races: set[str], name: Callable[[int], str]) -> None:
        self.mode = mode
        self.random = chance
        self.races = races
        self.name = name
        self.writes: dict[int, list[_Write]] = {}  # by address, oldest first; only what this launch wrote
        self.released: dict[int, np.ndarray] = {}  # by address: what an acquire there comes to know

    def load(self, clock: Clock, addresses: np.ndarray, mask: np.ndarray, result: np.ndarray) -> None:
        """Replaces values in `result`, loaded from real memory, that the program need not see yet."""
        if not self.writes:
            return
        bits = _bits(result)
        for i, address in _chosen(addresses, mask):
            writes = self.writes.get(address)
            if writes is None or clock.sees(writes[-1]):
                continue
            self.race("load", address, writes[-1], clock)
            self.same_size(address, writes[-1], bits)
            oldest = max(at for at, write in enumerate(writes) if clock.sees(write))
            if self.mode == "stale":
                bits[i] = writes[oldest].bits
            elif self.mode == "mixed":
                bits[i] = writes[self.random.randint(oldest, len(writes) - 1)].bits

    def store(self, clock: Clock, addresses: np.ndarray, mask: np.ndarray, values: np.ndarray) -> None:
        bits = _bits(values)
        time = int(clock.knows[clock.block]) + 1
        for i, address in _chosen(addresses, mask):
            # The value from before the launch becomes junk, so that reading it too early cannot be right by luck.
            writes = self.of(address, ~bits.dtype.type(0))
            if not clock.sees(writes[-1]) and writes[-1].by != clock.program:
                self.race("store", address, writes[-1], clock)
            self.same_size(address, writes[-1], bits)
            writes.append(_Write(bits[i], clock.block, time, clock.program))
            self.released.pop(address, None)

    def atomic(
        self,
        clock: Clock,
        address: int,
        before: np.ndarray,
        after: np.ndarray,
        *,
        acquires: bool,
        releases: bool,
        replaces: bool,
    ) -> None:
        """An atomic that real memory has executed. replaces: its result depends on when it happens (an exchange)."""
        old, new = _bits(before)[0], _bits(after)[0]
        clock.knows[clock.thread] += 1
        writes = self.writes.get(address)
        plain = writes is not None and writes[-1].part == writes[-1].by  # the last write was a plain store
        if writes is not None and (plain or replaces) and not clock.sees(writes[-1]):
            self.race("atomic", address, writes[-1], clock)
        if old != new:
            write = _Write(new, clock.thread, int(clock.knows[clock.thread]), clock.program)
            self.of(address, old).append(write)
        if acquires and address in self.released:
            np.maximum(clock.knows, self.released[address], out=clock.knows)
        if releases:
            known = self.released.setdefault(address, np.zeros_like(clock.knows))
            np.maximum(known, clock.knows, out=known)

    def of(self, address: int, before: np.unsignedinteger) -> list[_Write]:
        return self.writes.setdefault(address, [_Write(before, 0, -1, -1)])

    def same_size(self, address: int, write: _Write, bits: np.ndarray) -> None:
        if write.bits.dtype != bits.dtype:
            raise NotImplementedError(f"{self.name(address)} is accessed in pieces of different sizes")

    def race(self, what: str, address: int, write: _Write, clock: Clock) -> None:
        other = "its own store, no barrier between" if write.by == clock.program else "another program's write"
        self.races.add(f"{what} of {self.name(address).partition('[')[0]} after {other}")


def _bits(values: np.ndarray) -> np.ndarray:
    """The values as unsigned integers of the same size; in the same memory if possible."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(f"u{flat.itemsize}")


def _chosen(addresses: np.ndarray, mask: np.ndarray) -> list[tuple[int, int]]:
    addresses, mask = addresses.reshape(-1), mask.reshape(-1)
    where = np.flatnonzero(mask)
    return list(zip(where.tolist(), addresses[where].tolist(), strict=True))
