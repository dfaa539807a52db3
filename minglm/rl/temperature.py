"""Choose the sampling temperature during training (paper 3.2, dynamic sampling temperature).

As a policy improves it becomes sure of itself and its answers become alike, so RL has less to compare. GLM-4.5 raises
the sampling temperature when that happens, as far as accuracy allows:

    plateau    |mean reward of the last window - mean reward of the window before| <= gain
    probe      score(T) on held-out problems, for every T of a grid and the present one
    next T     max { T : score(T) >= best score * (1 - drop) },  drop = 1%

Choices
- The paper does not say whether its 1% is of the score or of the scale; `relative` decides, of the score by default.
- A reward that falls is no plateau: more randomness would make it worse.
- The rule may also lower the temperature, when the present one costs more than the drop.
- After a probe both windows are filled anew, because rewards at another temperature cannot be compared.

The rollout and the loss must use one temperature: the loss divides its logits by the one that the rollout sampled with.

Simplified: the probe is a callable that the training loop provides. The caller handles its noise, and should give it
enough problems that 1% means something (with 1000 answers the standard error is already about 1.5%).
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

GRID = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)

Evaluate = Callable[[float], float]
"""Temperature -> score on held-out problems, higher is better."""


class TemperatureController:
    """Watch the mean reward of each step and choose the temperature of the next.

    Not wired yet: no stage uses it.

    Args:
        temperature: the first one.
        grid: temperatures that a probe tries besides the present one.
        window: steps that are compared with as many before them.
        gain: change of the mean reward that still counts as a plateau.
        drop: score that exploration may cost.
        relative: whether drop is a share of the best score, or in its units.

    `log` lists the decisions as dicts: step, the two means, every probed score, the bound, old and new temperature.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        grid: Sequence[float] = GRID,
        window: int = 20,
        gain: float = 0.01,
        drop: float = 0.01,
        relative: bool = True,
    ) -> None:
        for value in (temperature, *grid):
            if not 0 < value < math.inf:  # nor NaN, which no comparison holds of
                raise ValueError(
                    f"temperatures must be positive and finite: temperature = {temperature}, grid = {tuple(grid)}"
                )
        if not window >= 1:
            raise ValueError(f"window = {window}: must be at least 1")
        for name, value in (("gain", gain), ("drop", drop)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} = {value}: must be finite and not negative")
        self.temperature = temperature
        self.grid = tuple(grid)
        self.window = window
        self.gain = gain
        self.drop = drop
        self.relative = relative
        self.steps = 0
        self.rewards: list[float] = []
        """The last two windows."""
        self.log: list[dict[str, Any]] = []

    def observe(self, reward: float, evaluate: Evaluate) -> float:
        """Take one step's mean reward; return the temperature to sample the next step with.

        `evaluate` is called only on a plateau. Raises ValueError for a reward that is not finite: as a part of two means
        it would hide a plateau for two windows.
        """
        if not math.isfinite(reward):
            raise ValueError(f"reward = {reward} at step {self.steps + 1}: must be finite")
        self.steps += 1
        self.rewards.append(float(reward))
        self.rewards = self.rewards[-2 * self.window :]
        if len(self.rewards) == 2 * self.window:
            mean_before = fmean(self.rewards[: self.window])
            mean_now = fmean(self.rewards[self.window :])
            if abs(mean_now - mean_before) <= self.gain:
                self._probe(evaluate, mean_before, mean_now)
        return self.temperature

    def _probe(self, evaluate: Evaluate, mean_before: float, mean_now: float) -> None:
        """Score every temperature, and move to the highest one within the drop."""
        scores = {}
        for temperature in sorted({*self.grid, self.temperature}):
            score = float(evaluate(temperature))
            if math.isfinite(score):  # a failed probe is ignored
                scores[temperature] = score
        best = max(scores.values(), default=0.0)
        allowed_drop = self.drop * abs(best) if self.relative else self.drop
        bound = best - allowed_drop
        admissible = [temperature for temperature, score in scores.items() if score >= bound]
        chosen = max(admissible, default=self.temperature)
        self.log.append(
            {
                "step": self.steps,
                "before": mean_before,
                "now": mean_now,
                "scores": list(scores.items()),
                "bound": bound,
                "from": self.temperature,
                "to": chosen,
            }
        )
        self.temperature = chosen
        self.rewards = []

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, ready for JSON."""
        return {
            "temperature": self.temperature,
            "rewards": self.rewards,
            "steps": self.steps,
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.temperature = state["temperature"]
        self.steps = state["steps"]
        self.rewards = list(state["rewards"])
        self.log = list(state["log"])
