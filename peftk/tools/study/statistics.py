"""Paired differences over seeds or test examples, with confidence intervals, and how they are said."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

LEVEL = 0.95
RESAMPLES = 500
NONE_FOUND = "no difference was found"


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    @property
    def found(self) -> bool:
        """Whether it leaves out 0."""
        return not self.low <= 0 <= self.high

    def __str__(self) -> str:
        return f"{signed(self.mean)} ({LEVEL:.0%} interval {signed(self.low)} to {signed(self.high)})"


class Difference(NamedTuple):
    """The mean of a_i − b_i over seeds i and Student's interval; low and high are None for fewer than two seeds."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def found(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{signed(self.mean)} (one seed, no interval)"
        return f"{signed(self.mean)} ({LEVEL:.0%} interval {signed(self.low)} to {signed(self.high)})"

    def words(self, what: str, against: str) -> str:
        """A sentence that claims a difference, if one was found, and gives the interval."""
        if self.low is None:
            return f"{what} against {against}: {self}; one seed shows no difference."
        figures = f"{self}, n = {self.seeds} seeds"
        if not self.found:
            return f"Between {what} and {against} {NONE_FOUND}: {figures}."
        return f"{what} scores {'higher' if self.mean > 0 else 'lower'} than {against}: {figures}."


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """a_i and b_i are of the same seed: the same sentences in the same order, the same start of the head.

    Raises ValueError unless there are as many a as b, and some.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"b: expected as many numbers as a and at least one, got {len(a)} and {len(b)}")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(mean, None, None, 1)
    from scipy import stats

    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1)) * error
    return Difference(mean, mean - half, mean + half, len(differences))


def over_examples(
    metric: Callable[[Sequence[float], Sequence[float]], float],
    labels: Sequence[float],
    a: Sequence[float],
    b: Sequence[float],
) -> Interval:
    """metric of predictions a − that of b, of one model each, and its bootstrap interval over the test examples.

    It tells what other test examples would change, not what another seed would.
    """
    import numpy as np
    from scipy import stats

    def difference(y: Any, p: Any, q: Any) -> float:
        return metric(y, p) - metric(y, q)

    columns = [np.asarray(values) for values in (labels, a, b)]
    mean = difference(*columns)
    if np.array_equal(columns[1], columns[2]):
        return Interval(mean, mean, mean)
    found = stats.bootstrap(
        columns,
        difference,
        paired=True,
        vectorized=False,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
