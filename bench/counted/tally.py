"""Adds up what the tiles of a launch request. Distinct bytes of small tables are counted by marking their entries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from bench.counted.work import Launch, Traffic


class Tally:
    def __init__(self) -> None:
        self.read: defaultdict[str, int] = defaultdict(int)
        self.written: defaultdict[str, int] = defaultdict(int)
        self.atomics: defaultdict[str, int] = defaultdict(int)
        self.marks: defaultdict[str, set[int]] = defaultdict(set)
        self.widths: dict[str, int] = {}
        self.flops = 0
        self.vector_flops = 0

    def table(self, name: str, width: int, entries: Iterable[int], times: int = 1) -> None:
        """Reads each of the entries, of `width` bytes, `times` times."""
        entries = list(entries)
        self.read[name] += len(entries) * width * times
        self.marks[name].update(entries)
        self.widths[name] = width

    def launch(self, kernel: str, reads: dict[str, int], writes: dict[str, int]) -> Launch:
        """reads, writes: distinct bytes of the tensors that are not tables."""
        for name, marked in self.marks.items():
            reads = {**reads, name: len(marked) * self.widths[name]}
        names = [name for name in {**self.read, **self.written} if self.read[name] or self.written[name]]
        tensors = {
            name: Traffic(self.read[name], self.written[name], reads.get(name, 0), writes.get(name, 0))
            for name in names
        }
        atomics = {name: n for name, n in self.atomics.items() if n}
        return Launch(kernel, tensors, self.flops, atomics, self.vector_flops)
