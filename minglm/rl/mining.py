"""Mine the prompts that provoke faults, from the answers of the model that is to be cured of them (paper 3.4, pathology RL).

    provoking = {prompts of the pool with a fault in one of `answers` samples, or more}

A fault is what the detectors of `rewards.pathology` find. On ordinary prompts it is rare, so that RL on these hardly ever
meets its penalty; on a prompt that provoked it once it is likely to come again. The answers are counted by a `Screener`,
which keeps them in a file, so that a stopped run goes on where it was, on any number of ranks.

Simplified: the paper does not say how its prompts were found.
"""

from typing import NamedTuple

from minglm.config import Split
from minglm.config.posttraining import MiningConfig
from minglm.rl.curriculum import Problem
from minglm.rl.episode import Trajectory
from minglm.rl.schedule import evenly_spread
from minglm.rl.screening import Counted, Screener


class Mined(NamedTuple):
    """What mining found."""

    asked: list[Problem]
    counts: list[Counted]
    """The answers with a fault to each of those asked."""

    @property
    def provoking(self) -> list[Problem]:
        """Return the prompts that were answered with a fault, once or more."""
        return [
            problem for problem, count in zip(self.asked, self.counts, strict=True) if count.counted
        ]


def has_fault(trajectory: Trajectory) -> bool:
    """Return whether an answer has a fault of form."""
    return any(trajectory.faults().values())


def mine(screener: Screener, config: MiningConfig, thinking_share: float) -> Mined:
    """Ask training prompts of every environment of a screener that counts faults, and say which provoked any.

    thinking_share: of the prompts of each environment. A prompt keeps its thinking switch in training.
    """
    asked = []
    for environment in screener.environments.values():
        tasks = environment.distinct_tasks(config.pool, screener.seed, Split.TRAIN)
        for number, task in enumerate(tasks):
            asked.append(Problem(task, evenly_spread(number, thinking_share)))
    return Mined(asked, screener.draw("faults", asked, config.answers, 0))
