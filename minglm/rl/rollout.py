"""Roll out: play every task several times, all episodes at once (paper 3.5).

    groups[p][g]  =  trajectory of sample g of task p

Every episode is a coroutine, and all of them run in one event loop, so that the generator always has the
turns of all episodes that wait for the model, and no episode waits for another one.

Choices: every draw follows from the rollout's seed and the numbers of task, sample and turn, never from the
order in which episodes happen to proceed. The order of the groups is that of the tasks.

Ranks divide the episodes among them. As no draw depends on who plays, they sample what one process samples.

Simplified: an answer's log-probabilities depend in their last bits on what shares its batch (float32, about
1e-6). With environments that answer at once the batches are a function of the seed, and a rollout repeats bit
for bit. With ones that wait in another thread between two turns the batches depend on time as well.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any

from minglm.envs.base import Environment, Task
from minglm.rewards.hybrid import Grader
from minglm.rl.buffer import GroupTask
from minglm.rl.episode import Player, Trajectory, opening_of, play
from minglm.rl.grading import grade

PRIME = 1_000_003
MAX_TURNS = 101  # turns of an episode that get seeds of their own


def turn_seed(seed: int, task: int, sample: int, turn: int) -> int:
    """Return the seed of one request: a function of the rollout's seed and the numbers of task, sample and turn."""
    number = (seed * PRIME + task) * PRIME + sample
    return (number * MAX_TURNS + turn) % 2**62


async def play_episodes(
    player: Player,
    environments: Mapping[str, Environment],
    tasks: Sequence[Task],
    samples: int,
    numbers: Sequence[int],
    thinking: Sequence[bool],
    seed: int,
) -> list[Trajectory]:
    """Play the episodes of these numbers, inside an event loop.

    Episode p * samples + g is sample g of task p.

    The other arguments are those of `rollout`. Returns the trajectories in the order of the numbers.
    """
    coroutines = []
    openings: dict[int, list[int]] = {}
    for number in numbers:
        p, g = divmod(number, samples)
        if p not in openings:
            openings[p] = opening_of(player, tasks[p], thinking[p])

        def seed_of_turn(turn: int, p: int = p, g: int = g) -> int:
            return turn_seed(seed, p, g, turn)

        environment = environments[tasks[p].environment]
        coroutines.append(
            play(player, environment, tasks[p], thinking[p], seed_of_turn, openings[p])
        )
    return await all_of(coroutines)


async def play_group(
    player: Player, environments: Mapping[str, Environment], task: GroupTask, samples: int
) -> list[Trajectory]:
    """Play one group of a round, as `play_episodes` plays all of them, inside an event loop."""
    coroutines = []
    player = player.at(task.temperature)
    opening = opening_of(player, task.task, task.thinking)
    for sample in range(samples):

        def seed_of_turn(turn: int, sample: int = sample) -> int:
            return turn_seed(task.seed, task.number, sample, turn)

        environment = environments[task.task.environment]
        coroutines.append(
            play(player, environment, task.task, task.thinking, seed_of_turn, opening)
        )
    return await all_of(coroutines)


async def all_of(coroutines: Iterable[Coroutine[Any, Any, Trajectory]]) -> list[Trajectory]:
    """Run episodes side by side. Return their trajectories in order; the exception of one ends all."""
    episodes = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*episodes)
    except BaseException:
        # One failed, or the rollout was cancelled: end the others before the exception continues.
        for episode in episodes:
            episode.cancel()
        await asyncio.gather(*episodes, return_exceptions=True)
        raise


def rollout(
    player: Player,
    environments: Mapping[str, Environment],
    tasks: Sequence[Task],
    samples: int,
    thinking: Sequence[bool] | None = None,
    seed: int = 0,
    grader: Grader | None = None,
) -> list[list[Trajectory]]:
    """Play every task `samples` times, from code without an event loop.

    Args:
        player: the model's side of the episodes. Its ranks divide them, and each gets the trajectories of all.
        environments: {name: Environment} of the tasks.
        tasks: the tasks.
        samples: episodes of each task.
        thinking: the thinking switch of each task; None: on for all.
        seed: decides every draw.
        grader: gives the rewards; None: they are the scores of the environments.

    Returns, for each task, the list of its trajectories.
    """
    if thinking is None:
        thinking = [True] * len(tasks)
    assert len(thinking) == len(tasks), "a thinking switch for each task"

    def play_own(numbers: Sequence[int]) -> list[Trajectory]:
        trajectories = asyncio.run(
            play_episodes(player, environments, tasks, samples, numbers, thinking, seed)
        )
        if grader is not None:
            grade(grader, environments, player.tokenizer, trajectories)
        return trajectories

    trajectories = player.ranks.deal(play_own, range(len(tasks) * samples))
    return [trajectories[p * samples : (p + 1) * samples] for p in range(len(tasks))]
