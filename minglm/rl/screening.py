"""Measure before a stage how hard its problems are for the model, once, and keep it in a file (paper 3.2).

    pool        the first problems of each environment
    first draw  8 answers to each                                              pass@8
    second      up to 512 answers to those that may be extremely hard          pass@512
    held out    development problems, 8 answers; the moderate ones guard the stage

An answer is right when its score is full. Samples whose environment failed do not count; a problem without any other is
drawn neither again nor trained on. What was drawn is written after every few problems, so a run that is stopped goes on
where it was. Every draw follows from the seed and the place of the problem.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from minglm.common.files import read_object, write_json
from minglm.config import Split
from minglm.config.posttraining import CurriculumConfig
from minglm.envs.base import Environment
from minglm.rl.curriculum import (
    PassRate,
    Problem,
    Tier,
    tier_of,
)
from minglm.rl.episode import Player, Trajectory
from minglm.rl.rollout import rollout
from minglm.rl.schedule import evenly_spread

ANSWERS_AT_ONCE = 512
SECOND_DRAW_SEED = 10**9  # apart from the seeds of the first
HELD_OUT_SEED = 2 * 10**9


class Counted(NamedTuple):
    """The answers to one problem that were counted: by default the right ones."""

    counted: int
    answers: int
    """Those whose environment worked."""


def is_right(trajectory: Trajectory) -> bool:
    """Return whether an answer has full marks."""
    return trajectory.score.value >= 1


@dataclass(frozen=True)
class Screener:
    """Plays problems, and keeps what came out in a file."""

    player: Player
    """The model's side, at the temperature of the stage."""
    environments: Mapping[str, Environment]
    seed: int
    path: Path | None
    """JSON file: {name of a draw: [[counted, answers] of each problem so far]}; None: nothing is kept."""
    bar: tqdm
    """Counts answers."""
    writes: bool = True
    """Whether this process is the one that writes the file."""
    counts: Callable[[Trajectory], bool] = is_right
    """Which answers are counted."""

    def draw(
        self, name: str, problems: Sequence[Problem], samples: int, seed: int
    ) -> list[Counted]:
        """Return the counted answers to each problem, of `samples`; what the file has of this draw is not drawn again."""
        kept = read_object(self.path) if self.path is not None and self.path.exists() else {}
        try:
            found = [Counted(counted, answers) for counted, answers in kept.get(name, [])]
        except (TypeError, ValueError):
            raise ValueError(
                f"{self.path}: {name!r} holds no counts of answers; remove the file"
            ) from None
        self.bar.update(len(found) * samples)
        at_once = max(1, ANSWERS_AT_ONCE // max(1, samples))
        for begin in range(len(found), len(problems), at_once):
            chunk = problems[begin : begin + at_once]
            groups = rollout(
                self.player,
                self.environments,
                [problem.task for problem in chunk],
                samples,
                [problem.thinking for problem in chunk],
                self.seed + seed + begin,
            )
            for group in groups:
                valid = [trajectory for trajectory in group if trajectory.valid]
                found.append(Counted(sum(map(self.counts, valid)), len(valid)))
            if self.writes and self.path is not None:
                write_json(self.path, kept | {name: found})
            self.bar.update(len(chunk) * samples)
        return found


class Screened(NamedTuple):
    """What a screening found."""

    tiers: dict[Tier, dict[str, list[Problem]]]
    """Problems of the pool by tier and environment."""
    rates: list[PassRate]
    """Of all problems that could be scored."""
    held_out: list[Problem]
    """Moderate development problems."""


def screen(
    screener: Screener, names: Sequence[str], config: CurriculumConfig, thinking_share: float
) -> Screened:
    """Sort the problems of a stage by difficulty. names: its environments; thinking_share: of the problems of each."""
    names = list(dict.fromkeys(names))

    def problems_of(split: Split, count: int) -> list[Problem]:
        problems = []
        for name in names:
            tasks = screener.environments[name].distinct_tasks(count, screener.seed, split)
            for number, task in enumerate(tasks):
                problems.append(Problem(task, evenly_spread(number, thinking_share)))
        return problems

    pool = problems_of(Split.TRAIN, config.pool)
    first = screener.draw("first", pool, config.screen, 0)
    seen = [PassRate(counts.answers, counts.counted) for counts in first]

    more = config.search - config.screen
    again = []
    if more:
        again = [
            i
            for i, rate in enumerate(seen)
            if rate.first and config.leaves_open(rate.first_right, rate.first)
        ]
    second = screener.draw("second", [pool[i] for i in again], more, SECOND_DRAW_SEED)
    for i, counts in zip(again, second, strict=True):
        seen[i] = seen[i]._replace(second=counts.answers, second_right=counts.counted)

    tiers = {tier: {name: [] for name in names} for tier in Tier}
    for problem, rate in zip(pool, seen, strict=True):
        if rate.first:
            tiers[tier_of(rate, config)][problem.task.environment].append(problem)

    candidates = problems_of(Split.DEVELOPMENT, config.guard_problems)
    counted = screener.draw("held out", candidates, config.screen, HELD_OUT_SEED)
    held_out = []
    for problem, counts in zip(candidates, counted, strict=True):
        rate = counts.counted / counts.answers if counts.answers else 0.0
        if config.moderate_lowest <= rate <= config.moderate_highest:
            held_out.append(problem)
    return Screened(tiers, [rate for rate in seen if rate.first], held_out)
