"""Roll out: play every task several times, all episodes at once (paper 3.5).

    groups[p][g]  =  trajectory of sample g of task p

Every episode is a coroutine, and all of them run in one event loop, so that the generator always has the turns of all
episodes that wait for the model, and no episode waits for another one.

Choices: every draw follows from the rollout's seed and the numbers of task, sample and turn, never from the order in
which episodes happen to proceed. The order of the groups is that of the tasks.

Simplified: an answer's log-probabilities depend in their last bits on what shares its batch (float32, about 1e-6). With
environments that answer at once the batches are a function of the seed, and a rollout repeats bit for bit. With ones
that wait in another thread between two turns the batches depend on time as well.
"""

import asyncio
from collections.abc import Mapping, Sequence

from minglm.envs.base import Environment, Task
from minglm.rl.episode import Player, Trajectory, play

PRIME = 1_000_003
MAX_TURNS = 101  # turns of an episode that get seeds of their own


def turn_seed(seed: int, task: int, sample: int, turn: int) -> int:
    """Return the seed of one request: a function of the rollout's seed and the numbers of task, sample and turn."""
    number = (seed * PRIME + task) * PRIME + sample
    return (number * MAX_TURNS + turn) % 2**62


async def gather_groups(
    player: Player,
    environments: Mapping[str, Environment],
    tasks: Sequence[Task],
    samples: int,
    thinking: Sequence[bool] | None = None,
    seed: int = 0,
) -> list[list[Trajectory]]:
    """Play every task `samples` times, inside an event loop that already runs.

    Args:
        player: the model's side of the episodes.
        environments: {name: Environment} of the tasks.
        tasks: the tasks.
        samples: episodes of each task.
        thinking: the thinking switch of each task; None: on for all.
        seed: decides every draw.

    Returns, for each task, the list of its trajectories.
    """
    if thinking is None:
        thinking = [True] * len(tasks)
    episodes = []
    for p, (task, think) in enumerate(zip(tasks, thinking, strict=True)):
        for g in range(samples):
            environment = environments[task.environment]

            def seed_of_turn(turn: int, p: int = p, g: int = g) -> int:
                return turn_seed(seed, p, g, turn)

            episode = play(player, environment, task, think, seed_of_turn)
            episodes.append(asyncio.ensure_future(episode))
    try:
        trajectories = await asyncio.gather(*episodes)
    except BaseException:
        # One failed, or the rollout was cancelled: end the others before the exception continues.
        for episode in episodes:
            episode.cancel()
        await asyncio.gather(*episodes, return_exceptions=True)
        raise
    return [trajectories[p * samples : (p + 1) * samples] for p in range(len(tasks))]


def rollout(
    player: Player,
    environments: Mapping[str, Environment],
    tasks: Sequence[Task],
    samples: int,
    thinking: Sequence[bool] | None = None,
    seed: int = 0,
) -> list[list[Trajectory]]:
    """Play every task `samples` times, from code without an event loop. Arguments are those of `gather_groups`."""
    return asyncio.run(gather_groups(player, environments, tasks, samples, thinking, seed))
