"""The order in which waiting requests are served: fair over tenants, first come first served within one."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Waiting items by tenant. The tenant that was given the least work comes first.

    A tenant that comes back after a pause starts level with the others: what it did not use is not saved up.

    Source: Sheng et al. 2024, "Fairness in Serving Large Language Models" (virtual token counter).
    """

    def __init__(self) -> None:
        self._waiting: dict[str, collections.deque[T]] = {}
        self._work: dict[str, float] = {}  # given to each waiting tenant
        self._level = 0.0  # of the tenant that was served last

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, tenant: str, item: T) -> None:
        if tenant not in self._waiting:
            self._waiting[tenant] = collections.deque()
            self._work[tenant] = max(self._work.get(tenant, 0.0), self._level)
        self._waiting[tenant].append(item)

    def __iter__(self) -> Iterator[T]:
        """The waiting items in the order in which they should be served now: one of each tenant, then the next ones."""
        tenants = sorted(self._waiting, key=lambda tenant: self._work[tenant])
        rounds = max(map(len, self._waiting.values()), default=0)
        for number in range(rounds):
            yield from (self._waiting[t][number] for t in tenants if number < len(self._waiting[t]))

    def remove(self, tenant: str, item: T) -> bool:
        """Takes an item out; False if it is not there."""
        queue = self._waiting.get(tenant, ())
        if item not in queue:
            return False
        queue.remove(item)  # type: ignore[union-attr]  # it is a deque then
        if not queue:
            del self._waiting[tenant]
        return True

    def served(self, tenant: str, work: float) -> None:
        """Notes that a tenant was given work. Tenants without waiting items are forgotten once others are ahead."""
        self._level = max(self._level, min((self._work[t] for t in self._waiting), default=self._level))
        self._work[tenant] = max(self._work.get(tenant, 0.0), self._level) + work
        if not self._waiting:  # all are served: who comes next starts level with this one
            self._level = max(self._work.values())
        for other in [t for t, done in self._work.items() if t not in self._waiting and done <= self._level]:
            del self._work[other]
