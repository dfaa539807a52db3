"""The temperature: raised only on evidence, lowered hardly ever, the same in rollout and loss, restored on resuming."""

import itertools
import math
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import DynamicTemperatureConfig
from minglm.rl.temperature import Decision, TemperatureController, Verdict, choose, upper_bound
from minglm.testing.rl import check_plateau, check_temperature_choice
from minglm.testing.strategies import numbers, seeds

CONFIG = DynamicTemperatureConfig(window=3, drop=0.05)


def test_choice_keeps_the_contract():
    """Over simulated probes: seldom wrong, hardly ever lower, never over a hole, and high where that costs nothing."""
    check_temperature_choice(choose)


def of_the_means(scores, present, config):
    """Broken: the highest temperature whose mean is within the drop of the highest mean."""
    means = {temperature: fmean(values) for temperature, values in scores.items()}
    bound = (1 - config.drop) * max(means.values())
    chosen = max(temperature for temperature, mean in means.items() if mean >= bound)
    return Decision(chosen, Verdict.RAISED, [])


def over_holes(scores, present, config):
    """Broken: take any safe temperature, not only those that follow without a gap."""
    decision = choose(scores, present, config)
    safe = [probed.temperature for probed in decision.probed if probed.cost < 0]
    return decision._replace(temperature=max([decision.temperature, *safe]))


def unpaired(scores, present, config):
    """Broken: sort the scores of each temperature, as if they were of the same problems in that order."""
    return choose({t: sorted(values) for t, values in scores.items()}, present, config)


def never(scores, present, config):
    """Broken: keep the temperature, which is always safe."""
    return choose(scores, present, config)._replace(temperature=present)


@pytest.mark.parametrize("broken", [of_the_means, over_holes, unpaired, never])
def test_contract_finds_a_broken_choice(broken):
    """Each shortcut is found."""
    with pytest.raises(AssertionError):
        check_temperature_choice(broken)


def test_plateau_keeps_the_contract():
    """Due when the reward stands still, never while it climbs or falls."""
    check_plateau(TemperatureController)


class Patient(TemperatureController):
    """Broken: takes a slow fall for a plateau."""

    def observe(self, reward):
        """Forget the best window."""
        self.best = None
        due = super().observe(reward)
        if len(self.rewards) < 2 * self.config.window:
            return due
        half = self.config.window
        change = fmean(self.rewards[half:]) - fmean(self.rewards[:half])
        return abs(change) <= self.config.gain


class Impatient(TemperatureController):
    """Broken: is due at every step with full windows."""

    def observe(self, reward):
        """Ask nothing of the reward."""
        super().observe(reward)
        return len(self.rewards) == 2 * self.config.window


class Forgetful(TemperatureController):
    """Broken: does not store the rewards it has seen."""

    def load_state_dict(self, state):
        """Lose the windows."""
        super().load_state_dict(state | {"rewards": []})


class Continuing(TemperatureController):
    """Broken: keeps the windows of before the decision."""

    def decide(self, scores):
        """Put the rewards back."""
        kept = self.rewards
        decision = super().decide(scores)
        self.rewards = kept
        return decision


@pytest.mark.parametrize("broken", [Patient, Impatient, Forgetful, Continuing])
def test_contract_finds_a_broken_controller(broken):
    """Each shortcut is found."""
    with pytest.raises(AssertionError):
        check_plateau(broken)


@given(seed=seeds, size=st.integers(1, 200), risk=st.sampled_from([0.01, 0.05, 0.5]))
def test_the_bound_covers_the_mean(seed, size, risk):
    """It lies above the mean of the values with two made-up ones of sum 0, nearer with more of them and more risk."""
    values = (2 * torch.rand(size, generator=numbers(seed), dtype=torch.float64) - 1).tolist()
    bound = upper_bound(values, risk)
    mean = sum(values) / (size + 2)
    assert bound >= mean - 1e-12
    assert (
        upper_bound(values * 4, risk) - fmean(values) * size * 4 / (size * 4 + 2)
        <= bound - mean + 1e-12
    )
    assert upper_bound(values, risk / 2) >= bound


def test_agreement_is_no_certainty():
    """Three problems solved at both temperatures do not show a cost below 1%; a thousand do."""
    config = DynamicTemperatureConfig(window=3)
    for problems, chosen in ((3, 1.0), (100, 1.0), (1000, 1.2)):
        scores = {1.0: [1.0] * problems, 1.2: [1.0] * problems}
        assert choose(scores, 1.0, config).temperature == chosen


def test_a_bound_of_zero_is_not_safe():
    """Where the bound is the mean, equal scores cost exactly 0, which is not below 0."""
    config = DynamicTemperatureConfig(window=3, drop=0.0, risk=0.5)
    assert choose({1.0: [0.5] * 9, 1.2: [0.5] * 9}, 1.0, config).temperature == 1.0
    assert choose({1.0: [0.5] * 9, 1.2: [0.6] * 9}, 1.0, config).temperature == 1.2


@given(level=st.floats(0.2, 0.9), drop=st.floats(0.02, 0.2), relative=st.booleans())
def test_relative_and_absolute_drop(level, drop, relative):
    """Without noise a temperature is safe exactly where its score is within the drop, a share of the best or absolute."""
    config = DynamicTemperatureConfig(window=3, drop=drop, relative=relative)
    problems = 20_000  # so that the two made-up ones weigh nothing
    allowed = drop * level if relative else drop
    for cost, chosen in ((0.5 * allowed, 1.2), (1.5 * allowed, 1.0)):
        scores = {1.0: [level] * problems, 1.2: [level - cost] * problems}
        assert choose(scores, 1.0, config).temperature == chosen


def test_a_decision_says_what_it_saw():
    """Every temperature in rising order with its mean and the bound of its cost, and a verdict."""
    better, worse = [1.0] * 1000, [0.5] * 1000
    decision = choose({1.2: worse, 1.0: better, 1.1: better}, 1.0, CONFIG)
    assert [probed.temperature for probed in decision.probed] == [1.0, 1.1, 1.2]
    assert [probed.score for probed in decision.probed] == [1.0, 1.0, 0.5]
    assert [probed.cost < 0 for probed in decision.probed] == [True, True, False]
    assert (decision.temperature, decision.verdict) == (1.1, Verdict.RAISED)
    lowered = choose({1.2: worse, 1.0: better, 1.1: better}, 1.2, CONFIG)
    assert (lowered.temperature, lowered.verdict) == (1.1, Verdict.LOWERED)
    assert choose({1.0: [], 1.1: []}, 1.0, CONFIG).verdict == Verdict.KEPT


def test_without_a_window_nothing_is_ever_due():
    """The default: the temperature stays, and no reward is kept."""
    subject = TemperatureController(0.7, DynamicTemperatureConfig())
    assert not any(subject.observe(0.5) for _ in range(100))
    assert subject.value == 0.7 and not subject.rewards


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_one_line(bad):
    """It would sit in a window, and no mean of it would ever be a plateau; a missing one is passed over."""
    subject = TemperatureController(1.0, CONFIG)
    assert not subject.observe(None) and not subject.rewards
    with pytest.raises(ValueError, match=f"reward = {bad}: must be finite"):
        subject.observe(bad)


@given(lowest=st.floats(0.1, 1.0), width=st.floats(0.1, 1.0), spacing=st.floats(0.02, 2.0))
def test_a_probe_stays_within_its_bounds(lowest, width, spacing):
    """From the lowest temperature on, evenly, and none beyond the highest, whatever the distance of two."""
    config = DynamicTemperatureConfig(lowest=lowest, highest=lowest + width, spacing=spacing)
    grid = config.grid()
    assert grid[0] == pytest.approx(lowest, abs=1e-6)
    assert grid[-1] <= config.highest + 1e-5 < grid[-1] + spacing + 2e-5
    assert all(b - a == pytest.approx(spacing, abs=2e-6) for a, b in itertools.pairwise(grid))
