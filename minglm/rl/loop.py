"""Run RL: groups of a step, update, publish the weights, log, checkpoint; here synchronously (paper 3.2, 3.5).

    for each step:  groups = rollouts.draw(step)  ->  trainer.learn(groups)  ->  rollouts.publish(weights, step + 1)

Where `draw` begins to play is all that the modes differ in. `Synchronous` plays a step when the trainer asks
for it, with the trainer's own weights, in the trainer's process. `minglm.rl.async_loop` has started it
before, in other processes.

Every draw follows from the seed and the number of the step, so a resumed run repeats nothing and needs no
random state. Groups without signal are replaced by groups of new prompts, in at most `refill` rounds; what
was drawn in vain is counted, and its rewards count as those of every other group.

With a curriculum a set of moderate problems is scored before the first hard step, and then every few steps.
From there on only weights whose score is healthy are kept as checkpoints; those of the last one return when
the score falls.

The loop saves and restores what pre-training does, the guard included; after too many skipped updates in a
row it rolls back to the last checkpoint.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Protocol

from tqdm import tqdm

from minglm.common.log import Log
from minglm.common.signals import Stopped, stop_between_steps
from minglm.common.trace import ROLLOUT, TRAINER, Phase, Span, Trace
from minglm.report.records import (
    CurriculumRecord,
    RLRecord,
    RollbackRecord,
    TemperatureRecord,
)
from minglm.rewards.hybrid import PARTS
from minglm.rewards.pathology import incidence
from minglm.rl.buffer import Buffer, DrawnGroups
from minglm.rl.curriculum import Verdict, mean_known
from minglm.rl.episode import Player, Trajectory
from minglm.rl.probe import problem_scores
from minglm.rl.rollout import rollout
from minglm.rl.samples import SampleFile
from minglm.rl.schedule import StepTasks, TaskSchedule
from minglm.rl.temperature import Scores
from minglm.rl.trainer import PolicyTrainer
from minglm.train.checkpoint import StageCheckpoints
from minglm.train.loop import log_slow_rank
from minglm.train.state import Stateful


def summarize(groups: Sequence[Sequence[Trajectory]]) -> dict[str, Any]:
    """Return numbers of one rollout for the log: reward, length, truncation, calls, faults.

    Samples whose environment failed are left out. The numbers are fields of `RLRecord`. When every
    environment failed the means are None and the shares by name are empty: 0 would say that every answer was
    wrong.
    """
    everything = [t for group in groups for t in group]
    trajectories = [t for t in everything if t.valid]
    by_environment: dict[str, list[float]] = {}
    calls = 0.0
    valid_calls = 0.0
    for t in trajectories:
        by_environment.setdefault(t.task.environment, []).append(t.score.value)
        if t.task.tools:
            calls += t.score.parts.get("calls", 0)
            valid_calls += t.score.parts.get("valid_calls", 0)
    faults = incidence([t.faults() for t in trajectories]) if trajectories else {}
    return {
        "reward": mean([t.score.value for t in trajectories], 4),
        "reward_by_env": {name: mean(v, 4) for name, v in by_environment.items()},
        "length": mean([t.length for t in trajectories], 2),
        "truncated": mean([t.truncated for t in trajectories], 4),
        "switch_ok": mean([t.switch_obeyed for t in trajectories], 4),
        "valid_calls": round(valid_calls / calls, 4) if calls else None,
        "reward_parts": reward_parts(trajectories),
        "incidence": {name: round(value, 4) for name, value in faults.items()},
        "infrastructure": len(everything) - len(trajectories) or None,
    }


def staleness(groups: Sequence[Sequence[Trajectory]], step: int) -> list[int] | None:
    """Return how many sampled tokens are so many versions old, from 0 on; None where all are of the newest one."""
    counts: Counter[int] = Counter()
    for group in groups:
        for trajectory in group:
            for segment in trajectory.segments:
                counts.update(step - version for version in segment.versions if version >= 0)
    oldest = max(counts, default=0)
    return [counts[age] for age in range(oldest + 1)] if oldest else None


def reward_parts(trajectories: Sequence[Trajectory]) -> dict[str, float] | None:
    """Return the mean of each part of a composed reward; None where rewards are the environments' scores."""
    values: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name in PARTS:
            if name in trajectory.score.parts:
                values.setdefault(name, []).append(trajectory.score.parts[name])
    return {name: round(fmean(found), 4) for name, found in values.items()} or None


def mean(values: Sequence[float], digits: int) -> float | None:
    """Return the mean of the values, rounded to so many decimal digits; None without values."""
    return round(fmean(values), digits) if values else None


class Rollouts(Protocol):
    """Where the groups of each step come from."""

    def draw(self, step: int) -> DrawnGroups:
        """Return the groups of a step, whenever they were played; steps are drawn in order."""
        ...

    def publish(self, version: int, changed: bool = True) -> None:
        """Roll out with the trainer's weights from now on.

        version: the steps that they have learned from. changed: whether they differ from those published before.
        """
        ...

    def spans(self) -> list[Span]:
        """Return what was done when, since the last call."""
        ...

    @property
    def parts(self) -> Mapping[str, Stateful]:
        """Return what a checkpoint keeps of them, by name."""
        ...


class Synchronous:
    """Rollouts in the trainer's own process, which a step waits for; the weights are handed over in place."""

    parts: Mapping[str, Stateful] = {}

    def __init__(self, trainer: PolicyTrainer, player: Player, schedule: TaskSchedule) -> None:
        self.trainer = trainer
        self.trace = Trace(ROLLOUT)
        self.player = replace(player, trace=self.trace)
        self.schedule = schedule

    def draw(self, step: int) -> DrawnGroups:
        """Play the groups of a step."""
        return draw_groups(self.trainer, self.player, self.schedule, step)

    def publish(self, version: int, changed: bool = True) -> None:
        """Let the generator use the trainer's weights, which it was made with."""
        generator = self.player.generator
        if changed:
            generator.update_weights(self.trainer.workers.weights(), version)
        else:
            generator.version = version

    def spans(self) -> list[Span]:
        """Return the phases of the episodes."""
        return self.trace.take()


def reinforce(
    trainer: PolicyTrainer,
    player: Player,
    schedule: TaskSchedule,
    checkpoints: StageCheckpoints,
    log: Log,
    stage: str,
    quiet: bool = False,
    rollouts: Rollouts | None = None,
    samples: SampleFile | None = None,
    keep_samples: int = 1,
) -> None:
    """Train for `trainer.config.steps` steps, resuming from `checkpoints`.

    A request to end saves and raises `Stopped`.

    Args:
        trainer: makes the updates.
        player: the model's side of the episodes that this process plays.
        schedule: deals the tasks.
        checkpoints: where the state is saved.
        log: gets one `RLRecord` per step, and one `TemperatureRecord` per probe.
        stage: name of the stage in the log.
        quiet: whether to hide the progress bar.
        rollouts: where the groups come from; None: this process plays them, synchronously.
        samples: where all samples are written, of every `keep_samples`-th step; None: nowhere.
    """
    state = trainer.state
    rollouts = rollouts or Synchronous(trainer, player, schedule)
    steps = trainer.config.steps
    curriculum = schedule.curriculum
    if curriculum is not None:
        state.parts = {**state.parts, "curriculum": curriculum}
    state.parts = {**state.parts, **rollouts.parts}
    resumed = state.restore(checkpoints)
    rollouts.publish(state.step, changed=resumed)
    if samples is not None:
        samples.cut(state.step)
    if trainer.guard.rollback_after and not resumed:
        state.save(checkpoints)  # something to roll back to
    bar = tqdm(initial=state.step, total=steps, desc=stage, unit="step", disable=quiet or None)
    with stop_between_steps(trainer.workers.agree) as stop, bar:
        while state.step < steps:
            if curriculum is not None and curriculum.is_due(state.step):
                check_curriculum(trainer, player, rollouts, schedule, checkpoints, log, stage)
            if curriculum is not None and curriculum.changes_at(state.step):
                trainer.temperature.forget()
            with trainer.workers.watched(f"stage {stage}, step {state.step + 1}"):
                kept = samples if keep_samples and state.step % keep_samples == 0 else None
                record = reinforce_step(trainer, rollouts, schedule, stage, kept)
            log.write(record)
            if trainer.temperature.observe(record.reward):
                log.write(probe_temperature(trainer, player, schedule, stage))
            log_slow_rank(trainer.workers, log, stage, state.step)
            if trainer.guard.gives_up:
                log.write(roll_back(trainer, rollouts, checkpoints, stage))
            reward = "none" if record.reward is None else f"{record.reward:.3f}"
            bar.set_postfix_str(f"reward {reward}, live {record.live_groups:.0%}", refresh=False)
            bar.update()
            try:
                stop()
            except Stopped:
                state.save(checkpoints)
                raise
            due = trainer.workers.agree(checkpoints.due())  # the clocks of ranks differ
            guarded = curriculum is not None and curriculum.guards(state.step)
            if due and not trainer.guard.in_a_row and not guarded:
                state.save(checkpoints, background=True)
        if curriculum is not None and curriculum.is_due(state.step):
            check_curriculum(trainer, player, rollouts, schedule, checkpoints, log, stage)


def draw_groups(
    trainer: PolicyTrainer, player: Player, schedule: TaskSchedule, step: int
) -> DrawnGroups:
    """Roll out the tasks of a step, and new ones in place of those that teach nothing, in at most `refill` rounds."""
    buffer = Buffer(schedule, trainer.informative, step + 1, step=step)
    buffer.begin()
    player = player.at(trainer.temperature.value)
    while not buffer.is_ready(step):
        tasks = buffer.deal()  # a round
        groups = rollout(
            player,
            schedule.environments,
            [task.task for task in tasks],
            trainer.config.samples,
            [task.thinking for task in tasks],
            tasks[0].seed,
            trainer.grader,
        )
        for task, group in zip(tasks, groups, strict=True):
            buffer.add(task.key, group)
    return buffer.take(step)


def reinforce_step(
    trainer: PolicyTrainer,
    rollouts: Rollouts,
    schedule: TaskSchedule,
    stage: str,
    samples: SampleFile | None = None,
) -> RLRecord:
    """Draw the groups of the next step, learn from them, write them to `samples`, and publish the new weights."""
    trace = Trace(TRAINER)
    trainer.keep_logprobs = samples is not None
    began = time.perf_counter()
    step = trainer.state.step
    temperature = trainer.temperature.value
    groups, refilled, keys = rollouts.draw(step)
    with trace.span(Phase.TRAIN):
        metrics = trainer.learn(groups, step)
    trainer.state.step += 1
    with trace.span(Phase.PUBLISH):
        rollouts.publish(trainer.state.step, changed=not metrics["skipped"])
    if samples is not None:
        samples.write(keys, groups)
    return RLRecord(
        stage=stage,
        step=trainer.state.step,
        seconds=round(time.perf_counter() - began, 3),
        temperature=temperature,
        tier=schedule.curriculum.tier(step) if schedule.curriculum is not None else None,
        refilled=refilled if schedule.refill else None,
        staleness=staleness(groups, step),
        spans=[list(span) for span in (*trace.take(), *rollouts.spans())],
        **summarize(groups),
        **metrics,
    )


def probe_temperature(
    trainer: PolicyTrainer, player: Player, schedule: TaskSchedule, stage: str
) -> TemperatureRecord:
    """Score every temperature on the same development problems, and move to the one that they lead to."""
    began = time.perf_counter()
    controller = trainer.temperature
    prompts = schedule.development(controller.config.problems)
    at_each = {}
    for temperature in controller.grid:
        at_each[temperature] = problem_scores(
            player.at(temperature),
            schedule.environments,
            prompts,
            controller.config.samples,
            schedule.rollout_seed(trainer.state.step),
        )
    scores = scored_everywhere(at_each)
    before = controller.value
    decision = controller.decide(scores)
    return TemperatureRecord(
        stage=stage,
        step=trainer.state.step,
        before=before,
        after=decision.temperature,
        verdict=decision.verdict,
        probed=[[round(number, 6) for number in probed] for probed in decision.probed],
        problems=len(scores[before]),
        seconds=round(time.perf_counter() - began, 3),
    )


def check_curriculum(
    trainer: PolicyTrainer,
    player: Player,
    rollouts: Rollouts,
    schedule: TaskSchedule,
    checkpoints: StageCheckpoints,
    log: Log,
    stage: str,
) -> None:
    """Score the held-out moderate problems.

    Keep the weights where the score is healthy, and roll them back where not.
    """
    began = time.perf_counter()
    curriculum = schedule.curriculum
    assert curriculum is not None, "a check needs a curriculum"
    prompts = StepTasks(
        [problem.task for problem in curriculum.held_out],
        [problem.thinking for problem in curriculum.held_out],
    )
    scores = problem_scores(
        player.at(trainer.config.temperature),
        schedule.environments,
        prompts,
        curriculum.config.guard_samples,
        schedule.rollout_seed(0),  # the same numbers at every check
    )
    done = trainer.state.step
    verdict = curriculum.check(scores, done)
    record = CurriculumRecord(
        stage=stage,
        step=done,
        score=round(mean_known(scores), 6),
        before=round(curriculum.baseline_score(), 6),
        verdict=verdict,
        problems=sum(score is not None for score in scores),
        seconds=round(time.perf_counter() - began, 3),
    )
    log.write(record)
    if verdict == Verdict.FALLEN:
        trainer.temperature.forget()
        log.write(roll_back(trainer, rollouts, checkpoints, stage))
    else:
        trainer.state.save(checkpoints)


def scored_everywhere(at_each: dict[float, list[float | None]]) -> Scores:
    """Return the scores of the problems that have one at every temperature."""
    rows = [row for row in zip(*at_each.values(), strict=True) if None not in row]
    return {temperature: [row[i] for row in rows] for i, temperature in enumerate(at_each)}


def roll_back(
    trainer: PolicyTrainer, rollouts: Rollouts, checkpoints: StageCheckpoints, stage: str
) -> RollbackRecord:
    """Restore weights and optimizer from the last checkpoint, while the tasks continue.

    Return the record of it.
    """
    to_step = trainer.state.roll_back(checkpoints)
    rollouts.publish(trainer.state.step)
    return RollbackRecord(
        stage=stage,
        step=trainer.state.step,
        to_step=to_step,
        left_out=trainer.guard.left_out,
    )
