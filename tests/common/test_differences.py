"""Paired differences: an interval that holds the truth, narrower than one that ignores the pairs."""

import math
import random
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.common.statistics import paired_difference

scores = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def simulated(rng, problems, gain):
    """Return the scores of four answers a problem, before and after; problems differ much in difficulty."""
    before = []
    after = []
    for _ in range(problems):
        rate = rng.betavariate(0.4, 0.6) * (1 - gain)
        before.append(fmean(rng.random() < rate for _ in range(4)))
        after.append(fmean(rng.random() < rate + gain for _ in range(4)))
    return before, after


def test_interval_covers_the_truth_and_uses_the_pairs():
    """About 95% of the intervals hold the true gain, and they are narrower than those of unpaired scores."""
    rng = random.Random(0)
    inside = 0
    for _ in range(200):
        before, after = simulated(rng, 60, gain=0.15)
        found = paired_difference(before, after)
        inside += found.low <= 0.15 <= found.high
        unpaired = 2 * 1.96 * math.hypot(stdev(before), stdev(after)) / math.sqrt(60)
        assert found.high - found.low < 0.8 * unpaired
    # 200 trials at 95% have a standard error of 1.5%: three of them
    assert inside / 200 > 0.905


@settings(max_examples=10)
@given(scores, st.randoms())
def test_difference_is_that_of_the_means(before, rng):
    """The mean of the differences, inside its interval; turned round it has the other sign; the same every time."""
    after = [rng.random() for _ in before]
    found = paired_difference(before, after)
    assert found.mean == pytest.approx(fmean(after) - fmean(before), abs=1e-12)
    # a mean of equal numbers may round
    assert found.low - 1e-12 <= found.mean <= found.high + 1e-12
    assert found == paired_difference(before, after)
    assert paired_difference(after, before).mean == pytest.approx(-found.mean)


def test_problems_without_a_score_are_left_out():
    """A problem that either stage could not be scored on is in neither mean."""
    found = paired_difference([0.0, None, 1.0, 0.5], [1.0, 1.0, None, 0.5])
    assert found == paired_difference([0.0, 0.5], [1.0, 0.5])


def test_other_problems_are_refused():
    """Scores of different lengths, and scores without a common problem, cannot be paired."""
    with pytest.raises(ValueError, match="2 problems before and 1 after"):
        paired_difference([0.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="a problem that both were scored on"):
        paired_difference([None, 1.0], [1.0, None])
