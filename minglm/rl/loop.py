"""Run RL synchronously: roll out, reward, update, log, checkpoint, with one set of weights (paper 3.2, 3.5).

    for each step:  tasks -> P x G episodes -> rewarded groups -> trainer -> new weights for the generator

Every draw follows from the seed and the number of the step, so a resumed run repeats nothing and needs no random state.
The loop saves and restores what pre-training does, the guard included; after too many skipped updates in a row it rolls
back to the last checkpoint.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from tqdm import tqdm

from minglm.common.log import Log
from minglm.common.signals import Stopped, stop_between_steps
from minglm.envs.base import Environment, Task
from minglm.report.records import RLRecord, RollbackRecord
from minglm.rewards.pathology import incidence
from minglm.rl.episode import Player, Trajectory
from minglm.rl.rollout import rollout
from minglm.rl.trainer import PolicyTrainer
from minglm.train.checkpoint import StageCheckpoints
from minglm.train.loop import log_slow_rank

SEEDS_PER_STAGE = 7919  # a prime, so that the rollout seeds of two stages do not meet early


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

    def draw(self, step: int) -> StepTasks:
        """Return the tasks of a step, numbered from 0."""
        tasks = []
        thinking = []
        for number in range(step * self.prompts, (step + 1) * self.prompts):
            environment = self.environments[self.names[number % len(self.names)]]
            tasks.append(environment.task(number, self.seed, "train"))
            # Thinking changes by whole rounds, so that each environment gets both.
            thinking.append(evenly_spread(number // len(self.names), self.thinking_share))
        return StepTasks(tasks, thinking)

    def rollout_seed(self, step: int) -> int:
        """Return the seed that decides every draw of a step's rollout."""
        return self.seed * SEEDS_PER_STAGE + step


def evenly_spread(number: int, share: float) -> bool:
    """Return True for a `share` of the numbers 0, 1, 2, ..., evenly spread."""
    return int((number + 1) * share) > int(number * share)


def summarize(groups: Sequence[Sequence[Trajectory]]) -> dict[str, Any]:
    """Return numbers of one rollout for the log: reward, length, truncation, calls, faults.

    Samples whose environment failed are left out. The numbers are fields of `RLRecord`. When every environment failed
    the means are None and the shares by name are empty: 0 would say that every answer was wrong.
    """
    everything = [t for group in groups for t in group]
    trajectories = [t for t in everything if t.valid]
    by_environment: dict[str, list[float]] = {}
    calls = 0.0
    valid_calls = 0.0
    for t in trajectories:
        by_environment.setdefault(t.task.environment, []).append(t.score.value)
        if t.task.tools:
            calls += t.score.parts["calls"]
            valid_calls += t.score.parts["valid_calls"]
    faults = incidence([t.faults() for t in trajectories]) if trajectories else {}
    return {
        "reward": mean([t.score.value for t in trajectories], 4),
        "reward_by_env": {name: mean(v, 4) for name, v in by_environment.items()},
        "length": mean([t.length for t in trajectories], 2),
        "truncated": mean([t.truncated for t in trajectories], 4),
        "switch_ok": mean([t.switch_obeyed for t in trajectories], 4),
        "valid_calls": round(valid_calls / calls, 4) if calls else None,
        "incidence": {name: round(value, 4) for name, value in faults.items()},
        "infrastructure": len(everything) - len(trajectories) or None,
    }


def mean(values: Sequence[float], digits: int) -> float | None:
    """Return the mean of the values, rounded to so many decimal digits; None without values."""
    return round(fmean(values), digits) if values else None


def reinforce(
    trainer: PolicyTrainer,
    player: Player,
    schedule: TaskSchedule,
    checkpoints: StageCheckpoints,
    log: Log,
    stage: str,
    quiet: bool = False,
) -> None:
    """Train for `trainer.config.steps` steps, resuming from `checkpoints`. A request to end saves and raises `Stopped`.

    Args:
        trainer: makes the updates.
        player: the model's side of the episodes; its generator gets the new weights after each update.
        schedule: deals the tasks.
        checkpoints: where the state is saved.
        log: gets one `RLRecord` per step.
        stage: name of the stage in the log.
        quiet: whether to hide the progress bar.
    """
    state = trainer.state
    steps = trainer.config.steps
    resumed = state.restore(checkpoints)
    if trainer.guard.rollback_after and not resumed:
        state.save(checkpoints)  # something to roll back to
    bar = tqdm(initial=state.step, total=steps, desc=stage, unit="step", disable=quiet or None)
    with stop_between_steps(trainer.workers.agree) as stop, bar:
        while state.step < steps:
            with trainer.workers.watched(f"stage {stage}, step {state.step + 1}"):
                record = reinforce_step(trainer, player, schedule, stage)
            log.write(record)
            log_slow_rank(trainer.workers, log, stage, state.step)
            if trainer.guard.gives_up:
                log.write(roll_back(trainer, player, checkpoints, stage))
            reward = "none" if record.reward is None else f"{record.reward:.3f}"
            bar.set_postfix_str(f"reward {reward}, live {record.live_groups:.0%}", refresh=False)
            bar.update()
            try:
                stop()
            except Stopped:
                state.save(checkpoints)
                raise
            due = trainer.workers.agree(checkpoints.due())  # the clocks of ranks differ
            if due and not trainer.guard.in_a_row:
                state.save(checkpoints, background=True)


def reinforce_step(
    trainer: PolicyTrainer, player: Player, schedule: TaskSchedule, stage: str
) -> RLRecord:
    """Roll out the next step's tasks, learn from them, and hand the new weights to the generator."""
    began = time.perf_counter()
    step = trainer.state.step
    tasks, thinking = schedule.draw(step)
    groups = rollout(
        player,
        schedule.environments,
        tasks,
        trainer.config.samples,
        thinking,
        schedule.rollout_seed(step),
    )
    metrics = trainer.learn(groups, step)
    if not metrics["skipped"]:
        player.generator.update_weights(trainer.workers.weights())
    trainer.state.step += 1
    return RLRecord(
        stage=stage,
        step=trainer.state.step,
        seconds=round(time.perf_counter() - began, 3),
        **summarize(groups),
        **metrics,
    )


def roll_back(
    trainer: PolicyTrainer, player: Player, checkpoints: StageCheckpoints, stage: str
) -> RollbackRecord:
    """Restore weights and optimizer from the last checkpoint, while the tasks continue. Return the record of it."""
    to_step = trainer.state.roll_back(checkpoints)
    player.generator.update_weights(trainer.workers.weights())
    return RollbackRecord(
        stage=stage,
        step=trainer.state.step,
        to_step=to_step,
        left_out=trainer.guard.left_out,
    )
