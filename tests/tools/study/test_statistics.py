"""Paired differences and their words, beside scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from peftk.tools.study.statistics import NONE_FOUND, over_examples, paired, spread
from peftk.tools.study.tasks import accuracy


@pytest.mark.parametrize("shift", [0.0, 0.4])
@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_interval_is_that_of_scipy(seeds, shift):
    drawn = np.random.default_rng(seeds)
    a, b = drawn.normal(shift, 0.1, seeds).tolist(), drawn.normal(0, 0.1, seeds).tolist()
    found = paired(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert found.found == (stats.ttest_rel(a, b).pvalue < 0.05)


def test_what_is_said():
    far, near, one = paired([0.8, 0.81, 0.82], [0.5, 0.5, 0.51]), paired([0.5, 0.6], [0.6, 0.5]), paired([0.9], [0.1])
    assert far.found
    assert far.words("LoRA", "BitFit").startswith("LoRA scores higher than BitFit: +0.307 (95% interval +0.")
    assert paired([0.5, 0.5, 0.51], [0.8, 0.81, 0.82]).words("BitFit", "LoRA").startswith("BitFit scores lower than")
    assert not near.found
    assert NONE_FOUND in near.words("LoRA", "BitFit")
    assert NONE_FOUND == "no difference was found"
    assert "n = 2 seeds" in near.words("LoRA", "BitFit")
    assert not one.found
    assert NONE_FOUND not in one.words("LoRA", "BitFit")
    assert "one seed" in one.words("LoRA", "BitFit")


def test_a_spread_is_the_mean_and_the_deviation():
    assert spread([0.5, 0.7]) == f"0.600 ± {np.std([0.5, 0.7], ddof=1):.3f}"
    assert spread([0.5]) == "0.500"


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_pairs_need_partners(a, b):
    with pytest.raises(ValueError, match="b: expected as many numbers as a"):
        paired(a, b)


def test_over_test_examples():
    drawn = np.random.default_rng(0)
    labels = drawn.integers(0, 2, 400)
    better = np.where(drawn.random(400) < 0.9, labels, 1 - labels)
    worse = np.where(drawn.random(400) < 0.7, labels, 1 - labels)
    found = over_examples(accuracy, labels, better, worse)
    right = (better == labels).astype(float) - (worse == labels)
    half = 1.96 * right.std(ddof=1) / 20
    assert found.mean == pytest.approx(right.mean())
    assert (found.low, found.high) == pytest.approx((right.mean() - half, right.mean() + half), abs=0.015)
    assert found.found
    assert over_examples(accuracy, labels, better, worse) == found  # the same resamples
    assert over_examples(accuracy, labels, worse, worse) == (0, 0, 0)
