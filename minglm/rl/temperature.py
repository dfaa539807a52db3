"""Raise the sampling temperature during training, as far as accuracy allows (paper 3.2, dynamic sampling temperature).

As a policy improves it becomes sure of itself and its answers become alike, so RL has less to compare.
GLM-4.5 raises the sampling temperature when that happens: when the reward has stopped rising, it scores a
range of temperatures on held-out problems and takes the highest one that costs at most 1%.

    plateau    mean reward of the last window <= mean of the window before + gain, and it does not fall
    probe      s_p(T): mean score of problem p over its answers at temperature T, for every T of a grid
    cost       c_p(T, T') = (1 - drop) s_p(T') - s_p(T)      relative: drop is a share of the other score
                          = s_p(T') - s_p(T) - drop          absolute: drop is in its units
    T is safe  when for every T' of the grid the mean of c_p(T, T') is below 0 but for a chance of `risk`
    next T     the last of the safe temperatures above the present one that follow it without a gap

A score is a mean over a few hundred answers, with an error larger than the 1% that is asked about. The
highest number of a noisy table is not the highest temperature that is good: so chosen, the temperature truly
costs more than the drop in 12 to 30% of the probes, and falls in a quarter of them. Here nothing changes
without evidence:

- The problems are the same at every temperature and so are the random numbers of their answers, so that only
  the differences within a problem count. The bound is that of their mean, normal, with two made-up problems
  added: one that costs 1 and one that gains 1. Without them a probe in which nothing differs would be certain
  after one problem.
- Safe means safe against each other temperature, hence against the best one, whichever it is. No maximum of
  noisy numbers is taken.
- The temperatures are tested upwards, one after the other, up to the first that fails. That the choice costs
  more than the drop needs the *first* bad temperature to pass, a chance of at most `risk` however long the
  grid is. It also means that no hole in the curve is jumped over.
- The temperature falls only when it is shown, with the same risk shared among the lower ones, that the
  present one costs more than the drop against one of them. It then falls step by step, as far as that is
  shown of the next one too.
- Where nobody solves anything nothing is shown, and the temperature stays.

A test of 1% needs many answers: `lessons/LOG.md` has how often the rule raises at how many. With too few it
errs on the side of the present temperature. A larger `drop` needs fewer.

A reward that falls is no plateau, because more randomness would make it worse. A slow fall looks like a
plateau from one window to the next, so the last window is also compared with the best one since the last
decision, and must not lie below it by more than two standard errors.

The rollout and the loss use one temperature: the loss divides its logits by the one that the rollout sampled
with. After a probe the windows are filled anew, because rewards at another temperature cannot be compared; so
they are when a curriculum goes on to harder problems.

Paper: plateau, range of temperatures, 1% and the maximum. Left open there and chosen here: what a plateau is,
what the 1% is a share of, and what to do about noise. Simplified: every probe risks its `risk` anew.
"""

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from statistics import NormalDist, fmean, variance
from typing import Any, NamedTuple

from minglm.config.posttraining import DynamicTemperatureConfig

Scores = Mapping[float, Sequence[float]]
"""Scores of the same problems in the same order, 0 to 1, at each temperature."""

FALL = 2.0  # standard errors


class Verdict(StrEnum):
    """What a probe led to."""

    RAISED = "raised"
    """A higher temperature is safe."""
    KEPT = "kept"
    """Nothing is shown."""
    LOWERED = "lowered"
    """The present temperature costs more than the drop."""


class Probed(NamedTuple):
    """What a probe says of one temperature."""

    temperature: float
    score: float
    """Mean over the problems."""
    cost: float
    """Upper bound of its cost against the temperature where that is highest; safe below 0."""


class Decision(NamedTuple):
    """What is to be done after a probe."""

    temperature: float
    """To sample the next step with."""
    verdict: Verdict
    probed: list[Probed]
    """Every temperature of the probe, in rising order."""


def upper_bound(values: Sequence[float], risk: float) -> float:
    """Return what the mean of numbers between -1 and 1 does not exceed, but for a chance of `risk`."""
    padded = [*values, -1.0, 1.0]
    mean = fmean(padded)
    squares = fmean([value * value for value in padded])
    error = math.sqrt((squares - mean * mean) / (len(padded) - 1))
    return mean + NormalDist().inv_cdf(1 - risk) * error


def costs(
    scores: Scores, temperature: float, other: float, config: DynamicTemperatureConfig
) -> list[float]:
    """Return by how much more than the drop one temperature costs against another, problem by problem."""
    pairs = zip(scores[temperature], scores[other], strict=True)
    if config.relative:
        return [(1 - config.drop) * theirs - own for own, theirs in pairs]
    return [theirs - own - config.drop for own, theirs in pairs]


def highest_cost(scores: Scores, temperature: float, config: DynamicTemperatureConfig) -> float:
    """Return the upper bound of a temperature's cost against the other one where that is highest."""
    others = [other for other in scores if other != temperature]
    bounds = [
        upper_bound(costs(scores, temperature, other, config), config.risk) for other in others
    ]
    return max(bounds, default=0.0)


def is_too_costly(scores: Scores, temperature: float, config: DynamicTemperatureConfig) -> bool:
    """Return whether it is shown that a temperature costs more than the drop, against a lower one."""
    lower = [other for other in scores if other < temperature]
    for other in lower:
        gains = [-cost for cost in costs(scores, temperature, other, config)]
        if upper_bound(gains, config.risk / len(lower)) < 0:
            return True
    return False


def choose(scores: Scores, present: float, config: DynamicTemperatureConfig) -> Decision:
    """Return the temperature that a probe leads to.

    Args:
        scores: of every temperature of the probe, the present one among them.
        present: the temperature now.
        config: the drop, and the risk of a wrong decision.
    """
    grid = sorted(scores)
    probed = []
    for temperature in grid:
        values = scores[temperature]
        mean = fmean(values) if values else 0.0  # every environment may have failed
        probed.append(Probed(temperature, mean, highest_cost(scores, temperature, config)))
    chosen = present
    for temperature, _, cost in probed:
        if temperature > present:
            if cost >= 0:
                break
            chosen = temperature
    if chosen == present:
        lower = [temperature for temperature in grid if temperature < present]
        while lower and is_too_costly(scores, chosen, config):
            chosen = lower.pop()
    verdict = Verdict.KEPT
    if chosen != present:
        verdict = Verdict.RAISED if chosen > present else Verdict.LOWERED
    return Decision(chosen, verdict, probed)


class TemperatureController:
    """Hold the temperature of a stage, `value`, and say when the reward of its steps calls for a probe.

    Args:
        temperature: the first one.
        config: window, gain, grid, drop and risk.
    """

    def __init__(self, temperature: float, config: DynamicTemperatureConfig) -> None:
        self.value = temperature
        self.config = config
        self.rewards: list[float] = []
        """The last two windows, or what there is of them."""
        self.best: float | None = None
        """The highest mean of a window since the last decision."""

    @property
    def grid(self) -> list[float]:
        """Return the temperatures of a probe, in rising order; the present one is among them."""
        return sorted({*self.config.grid(), self.value})

    def observe(self, reward: float | None) -> bool:
        """Take one step's mean reward; return whether it stands still, so that a probe is due.

        A step without a reward, because every environment failed, says nothing. Raises ValueError for one that is not
        finite: as a part of two means it would hide a plateau for two windows.
        """
        if reward is None:
            return False
        if not math.isfinite(reward):
            raise ValueError(f"reward = {reward}: must be finite")
        window = self.config.window
        if not window:
            return False
        self.rewards.append(float(reward))
        self.rewards = self.rewards[-2 * window :]
        if len(self.rewards) < 2 * window:
            return False
        before, now = self.rewards[:window], self.rewards[window:]
        best = -math.inf if self.best is None else self.best
        self.best = max(fmean(before), fmean(now), best)
        error = math.sqrt((variance(before) + variance(now)) / window)
        rises = fmean(now) > fmean(before) + self.config.gain
        falls = fmean(now) < self.best - FALL * error
        return not rises and not falls

    def decide(self, scores: Scores) -> Decision:
        """Move to the temperature that the scores of a probe lead to, and fill the windows anew."""
        decision = choose(scores, self.value, self.config)
        self.value = decision.temperature
        self.forget()
        return decision

    def forget(self) -> None:
        """Fill the windows anew, because rewards from here on cannot be compared with those before."""
        self.rewards = []
        self.best = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, ready for JSON."""
        return {"temperature": self.value, "rewards": self.rewards, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.value = state["temperature"]
        self.rewards = list(state["rewards"])
        self.best = state["best"]
