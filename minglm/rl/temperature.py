"""How freely to sample, decided while training (paper 3.2, dynamic sampling temperature).

A policy that improves becomes sure of itself, its answers alike, and reinforcement has less to compare. GLM-4.5 raises
the sampling temperature when that happens, as far as accuracy allows:

    plateau    |mean reward of the last window - mean reward of the window before| <= gain
    probe      score(T) on held-out problems, for every T of a grid and the present one
    next T     max { T : score(T) >= best score * (1 - drop) },  drop = 1%

Choices
- The paper does not say whether its 1% is of the score or of the scale; `relative` decides, of the score by default.
- A reward that falls is no plateau: more randomness would make it worse.
- The rule may also lower the temperature, when the present one costs more than the drop.
- After a probe both windows are filled anew, because rewards at another temperature cannot be compared.

The rollout and the loss must use the same temperature: the loss divides its logits by the one the rollout sampled with.

Simplified: the probe is a callable that the training loop provides; its noise is the caller's, who should give it
enough problems that 1% means something (with 1000 answers the standard error is already about 1.5%).
"""

import math
from statistics import fmean


class TemperatureController:
    """Watches the mean reward of each step and chooses the temperature of the next.

    temperature: the first one. grid: temperatures a probe tries besides the present one. window: steps compared with as
    many before them. gain: change of the mean reward that still counts as standing still. drop: score that exploration
    may cost. relative: whether drop is a share of the best score, or in its units.
    `log` lists the decisions as dicts: step, the two means, every probed score, the bound, old and new temperature.
    """

    def __init__(
        self,
        temperature=1.0,
        grid=(0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4),
        window=20,
        gain=0.01,
        drop=0.01,
        relative=True,
    ):
        if temperature <= 0 or min(grid, default=1) <= 0:
            raise ValueError(
                f"temperatures must be positive: temperature = {temperature}, grid = {tuple(grid)}"
            )
        if window < 1 or drop < 0:
            raise ValueError(f"window = {window} must be at least 1 and drop = {drop} not negative")
        self.temperature, self.grid, self.window = temperature, tuple(grid), window
        self.gain, self.drop, self.relative = gain, drop, relative
        self.rewards, self.steps, self.log = [], 0, []

    def observe(self, reward, evaluate):
        """Take one step's mean reward; return the temperature to sample the next step with.

        evaluate: callable, temperature -> score on held-out problems, higher is better. Called only on a plateau.
        """
        self.steps += 1
        self.rewards = (self.rewards + [float(reward)])[-2 * self.window :]
        if len(self.rewards) == 2 * self.window:
            before, now = fmean(self.rewards[: self.window]), fmean(self.rewards[self.window :])
            if abs(now - before) <= self.gain:
                self._probe(evaluate, before, now)
        return self.temperature

    def _probe(self, evaluate, before, now):
        scores = {t: float(evaluate(t)) for t in sorted({*self.grid, self.temperature})}
        scores = {t: score for t, score in scores.items() if math.isfinite(score)}
        best = max(scores.values(), default=0.0)
        bound = best - self.drop * (abs(best) if self.relative else 1.0)
        chosen = max((t for t, score in scores.items() if score >= bound), default=self.temperature)
        decision = {
            "step": self.steps,
            "before": before,
            "now": now,
            "scores": list(scores.items()),
            "bound": bound,
        }
        self.log.append(decision | {"from": self.temperature, "to": chosen})
        self.temperature, self.rewards = chosen, []

    def state_dict(self):
        """What a resumed run needs, ready for JSON."""
        return {name: getattr(self, name) for name in ("temperature", "rewards", "steps", "log")}

    def load_state_dict(self, state):
        """Continue from a `state_dict`."""
        self.temperature, self.steps = state["temperature"], state["steps"]
        self.rewards, self.log = list(state["rewards"]), list(state["log"])
