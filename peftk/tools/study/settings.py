"""How long a study is: a few steps on a few sentences, what two cores do in 90 minutes, or everything."""

from __future__ import annotations

import dataclasses

# Below this number of steps a run has not converged: its captions say that nothing is concluded.
ENOUGH_STEPS = 500


@dataclasses.dataclass(frozen=True)
class Settings:
    """tasks: all of them in parts 1 and 4, the first in the others. steps: of every run, with batches of `batch`.

    train, test, held_out: at most so many examples of a task; the held-out ones are training data on which learning
    rates are chosen. tokens: where sentences are cut.

    seeds: of part 1. other_seeds: of parts 2 to 7. rates: how many learning rates of each method's grid are tried;
    tune_each: for every row, not for one row of each family. sizes: of the training set, in part 7.
    together: the most adapters in one mixed batch. watched: at how many steps of a run forgetting is measured.
    """

    name: str
    tasks: tuple[str, ...]
    steps: int
    batch: int
    train: int
    test: int
    held_out: int
    tokens: int
    seeds: int
    other_seeds: int
    rates: int
    first_seed: int = 0
    tune_each: bool = False
    sizes: tuple[int, ...] = (100, 400, 1600, 8000)
    together: int = 4
    watched: int = 5
    timing_seconds: float = 40.0

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def fewer_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.other_seeds)

    @property
    def concludes(self) -> bool:
        return self.steps >= ENOUGH_STEPS


QUICK = Settings(
    name="quick",
    tasks=("cola",),
    steps=8,
    batch=8,
    train=96,
    test=64,
    held_out=32,
    tokens=32,
    seeds=2,
    other_seeds=1,
    rates=2,
    watched=2,
    sizes=(24, 96),
    timing_seconds=15.0,
)
DEFAULT = Settings(
    name="default",
    tasks=("sst2",),
    steps=500,
    batch=8,
    train=6000,
    test=500,
    held_out=300,
    tokens=24,
    seeds=3,
    other_seeds=1,
    rates=3,
    sizes=(100, 1000, 6000),
)
FULL = Settings(
    name="full",
    tasks=("cola", "sst2", "sick", "sick_r"),
    steps=3000,
    batch=32,
    train=1_000_000,
    test=1_000_000,
    held_out=500,
    tokens=64,
    seeds=5,
    other_seeds=3,
    rates=3,
    watched=10,
    tune_each=True,
)
