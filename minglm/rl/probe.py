"""Score the policy on some problems while it is trained: development problems, never those of the test (paper 3.2).

    score of a problem = mean score of its answers;  None where every sample's environment failed

Two probes with one seed draw the same random numbers for the answers to the same problem, so what differs
between them is the policy or its temperature.
"""

from collections.abc import Mapping
from statistics import fmean

from minglm.envs.base import Environment
from minglm.rl.episode import Player
from minglm.rl.rollout import rollout
from minglm.rl.schedule import StepTasks


def problem_scores(
    player: Player,
    environments: Mapping[str, Environment],
    prompts: StepTasks,
    samples: int,
    seed: int,
) -> list[float | None]:
    """Return the score of each problem, in their order.

    Args:
        player: the model's side, at the temperature to score.
        environments: by name.
        prompts: the problems.
        samples: answers to each.
        seed: decides every draw.
    """
    groups = rollout(player, environments, prompts.tasks, samples, prompts.thinking, seed)
    scores = []
    for group in groups:
        values = [trajectory.score.value for trajectory in group if trajectory.valid]
        scores.append(fmean(values) if values else None)
    return scores
