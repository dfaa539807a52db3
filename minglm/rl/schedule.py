"""Deal the tasks of each step of RL, as a function of the seed and the number of the step alone (paper 3.2).

    task number = (step * (1 + refill rounds) + round) * prompts + place         environment = number mod their count

Whatever happened before, a step deals the same tasks. A resumed run therefore repeats nothing and stores nothing. With a
curriculum the tasks are those of its pool, of the tier of the step. Chosen problems take the place of a share of the tasks;
the environments take turns in the others.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minglm.config import Split
from minglm.envs.base import Environment, Task
from minglm.rl.curriculum import Curriculum, Problem

SEEDS_PER_STAGE = 7919  # a prime, so that the rollout seeds of two stages do not meet early
SEEDS_PER_ROUND = 10**12  # beyond the seeds of all stages


class StepTasks(NamedTuple):
    """The prompts of one step."""

    tasks: list[Task]
    thinking: list[bool]
    """The thinking switch of each task."""


@dataclass(frozen=True)
class TaskSchedule:
    """Deals the tasks of each step round-robin from environments, with thinking on for a share of each."""

    environments: Mapping[str, Environment]
    """All environments by name."""
    names: Sequence[str]
    """Those that the tasks come from, in turn; a name may be repeated to weight it."""
    prompts: int
    """Tasks of a step."""
    seed: int
    thinking_share: float = 1.0
    """Share of the tasks of each environment with thinking on."""
    refill: int = 0
    """Rounds of new tasks that a step may draw after its first."""
    curriculum: Curriculum | None = None
    """Deals problems of a pool by their difficulty; None: every task is new."""
    chosen: Sequence[Problem] = ()
    """Problems that are dealt again and again, beside the tasks of the environments: prompts that provoke faults."""
    chosen_share: float = 0.0
    """Their share of the tasks; nothing where there are none."""

    def draw(self, step: int, refill: int = 0, places: Sequence[int] | None = None) -> StepTasks:
        """Return the tasks of a step, numbered from 0.

        refill: 0 for the first tasks of the step, then the number of the round. places: those among the prompts of the
        step that get a task; None: all.
        """
        tasks = []
        thinking = []
        first = (step * (1 + self.refill) + refill) * self.prompts
        for place in range(self.prompts) if places is None else places:
            number = first + place
            problem = self._problem(step, number)
            tasks.append(problem.task)
            thinking.append(problem.thinking)
        return StepTasks(tasks, thinking)

    def _problem(self, step: int, number: int) -> Problem:
        """Return the problem of a step that has this number in the stage."""
        if self.curriculum is not None:
            return self.curriculum.problem(step, number)
        turn = number
        if self.chosen:
            dealt = int(number * self.chosen_share)  # of the chosen problems, before this number
            if evenly_spread(number, self.chosen_share):
                epoch, place = divmod(dealt, len(self.chosen))
                order = list(range(len(self.chosen)))
                random.Random(f"{self.seed}/chosen/{epoch}").shuffle(order)
                return self.chosen[order[place]]
            turn -= dealt
        environment = self.environments[self.names[turn % len(self.names)]]
        # Thinking changes by whole rounds, so that each environment gets both.
        thinks = evenly_spread(turn // len(self.names), self.thinking_share)
        return Problem(environment.task(number, self.seed, Split.TRAIN), thinks)

    def development(self, problems: int) -> StepTasks:
        """Return development problems, so many different ones of each environment, or all where there are fewer."""
        tasks = []
        thinking = []
        for name in dict.fromkeys(self.names):
            found = self.environments[name].distinct_tasks(problems, self.seed, Split.DEVELOPMENT)
            tasks += found
            thinking += [evenly_spread(i, self.thinking_share) for i in range(len(found))]
        return StepTasks(tasks, thinking)

    def rollout_seed(self, step: int, refill: int = 0) -> int:
        """Return the seed that decides every draw of a step's rollout, or of one of its rounds of new tasks."""
        return self.seed * SEEDS_PER_STAGE + step + refill * SEEDS_PER_ROUND


def evenly_spread(number: int, share: float) -> bool:
    """Return True for a `share` of the numbers 0, 1, 2, ..., evenly spread."""
    return int((number + 1) * share) > int(number * share)
