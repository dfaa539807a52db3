"""Plan a run: its stages in order, with an estimate of the time each takes on this machine (paper Figure 3, 3.1).

    minutes = tokens * FLOPs per token / (speed of matrix products on this machine * share of it that stages reach)

A stage carries everything that its training and its evaluation need, so nothing has to be found again by its name.

Tokens are exact for pre- and mid-training. For the later stages they are an estimate from a few conversations of each
environment, as if no answer were rejected. A token of a rollout costs as much as one of training: all are sampled, and
those of groups with a signal are trained on. Answers that are drawn before the first step count too: those that mining asks
for, and those that screening is expected to draw (`minglm.plan.screening`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple

from minglm.chat import render_text
from minglm.config import (
    PostTrainingConfig,
    RLConfig,
    RunConfig,
    SFTConfig,
    StageConfig,
)
from minglm.envs import ENVIRONMENTS, Environments
from minglm.envs.base import Environment
from minglm.envs.twelve import TWELVE
from minglm.plan.counts import flops_per_token
from minglm.plan.screening import screening_answers
from minglm.recipe.inputs import check_environments, environments_of, provoking_kinds
from minglm.report.records import Moment
from minglm.train.checkpoint import CheckpointStore
from minglm.train.loop import Phase
from minglm.train.stages import phases

BYTES_PER_TOKEN = 3  # of conversations, with a tokenizer as small as the toy's
UTILISATION = {"cpu": 0.75, "cuda": 0.2}
"""FLOPs that a stage is planned to take, over its seconds and the speed of matrix products, by the kind of the device.

CPU: the stages of the three runs in figures/toy reach 0.77, 0.95 and 0.99 of 94 GFLOP/s, a core's speed, for each of their
threads; the first had two, the others one. After pre-training the plan has two to three times the tokens that are trained
on: groups without a signal are left out. GPU: `configs/mini.py` with six layers reached an MFU of 0.20 on an
H200, in pre-training.
"""
PACKED_LENGTH = (
    256  # tokens that a position attends to at most, for the estimate: packed documents are short
)

# Streams of training tasks: stages with different numbers never draw the same tasks. Mid-training has 1.
COLD_START_STREAM = 2
DISTILLATION_STREAM = 3
RL_STREAM = 4
CONTROL_STREAM = 5


class StageKind(StrEnum):
    """How a stage is trained."""

    PRETRAIN = "pretrain"
    """Next-token prediction on documents: pre- and mid-training."""
    COLD_START = "sft"
    """Fine-tuning of an expert on solutions of the oracle."""
    RL = "rl"
    """Reinforcement learning."""
    CONTROL = "control"
    """Fine-tuning of a cold start on more solutions of the oracle, for comparison with RL; nothing starts from it."""
    UNIFIED = "unified"
    """Fine-tuning on the experts' right answers."""


@dataclass(frozen=True)
class EvalPlan:
    """What is measured when a stage is trained."""

    text: bool = False
    """Measure bits per byte of held-out text, acceptance of the MTP layer's drafts, and needles."""
    environments: tuple[str, ...] = ()
    """Environments whose test tasks are scored."""
    thinking: tuple[bool, ...] = (True,)
    """Settings of the thinking switch under which they are scored."""
    brief: bool = False
    """Whether `EvaluationConfig.brief_problems` are enough with thinking too; without thinking they always are."""
    pathology: Moment | None = None
    """Measure pathologies too: as the state before, or after, they are trained away."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run; its class says how it is trained."""

    kind: ClassVar[StageKind]

    name: str
    teaches: str
    """What the stage is for, in a few words."""
    base: str | None
    """Name of the stage whose weights it starts from; None: freshly initialised weights."""
    tokens: int
    """Tokens trained on, of RL those sampled; an estimate after mid-training."""
    sequence_length: int
    """Positions of a row; for RL the bound on one answer, in tokens."""
    learning_rate: float
    """Peak learning rate."""
    seed: int
    """Seed of its draws: of documents in pre- and mid-training, of tasks afterwards."""
    evaluation: EvalPlan


@dataclass(frozen=True, kw_only=True)
class PretrainStage(Stage):
    """A stage of pre- or mid-training."""

    kind = StageKind.PRETRAIN

    config: StageConfig
    phase: Phase
    """Its part of the schedule that all stages of pre- and mid-training share."""


@dataclass(frozen=True, kw_only=True)
class ColdStartStage(Stage):
    """The first half of an expert: fine-tuning on solutions with their reasoning."""

    kind = StageKind.COLD_START

    config: SFTConfig
    environments: tuple[str, ...]
    """Environments whose solutions are shown."""


@dataclass(frozen=True, kw_only=True)
class RLStage(Stage):
    """Reinforcement learning: the second half of an expert, or a stage of the whole model."""

    kind = StageKind.RL

    config: RLConfig
    thinking_share: float
    """Share of the prompts with thinking switched on."""
    tokens_before: int
    """Those of `tokens` that are sampled before the first step, to screen problems or to mine prompts."""


@dataclass(frozen=True, kw_only=True)
class ControlStage(Stage):
    """What RL is compared with: its start, fine-tuned on as many tokens of more solutions as RL was trained on.

    A gain of RL that this stage has too is a gain of training longer.
    """

    kind = StageKind.CONTROL

    config: SFTConfig
    """That of the cold start, of which a control takes rate, batch and rows."""
    environments: tuple[str, ...]
    """Environments whose solutions are shown: those that RL was trained on."""
    compared: str
    """Name of the stage of RL."""


class Teacher(NamedTuple):
    """An expert whose answers the unified model learns from."""

    name: str
    stage: str
    """Name of the stage that trained it."""
    prompts: dict[str, int]
    """Prompts that it answers, by environment."""


@dataclass(frozen=True, kw_only=True)
class UnifiedStage(Stage):
    """Fine-tuning of one hybrid model on the experts' right answers."""

    kind = StageKind.UNIFIED

    config: SFTConfig
    teachers: tuple[Teacher, ...]


def plan_stages(run: RunConfig) -> list[Stage]:
    """Return every stage of a run, in order. Raises ValueError for an environment that does not exist."""
    check_environments(run)
    stages: list[Stage] = [*_pretraining(run)]
    base = stages[-1].name if stages else None
    teachers = []
    asking = environments_of(run)
    prompts = prompts_for(run.posttraining, asking)
    for number, (name, expert) in enumerate(run.posttraining.experts()):
        scores = EvalPlan(environments=expert.environments)
        tokens = expert.sft.samples * len(expert.environments)
        tokens *= conversation_tokens(expert.environments)
        cold_start = ColdStartStage(
            name=f"{name}.sft",
            teaches=f"cold start: {', '.join(expert.environments)}",
            base=base,
            tokens=int(expert.sft.epochs * tokens),
            sequence_length=expert.sft.sequence_length,
            learning_rate=expert.sft.peak_lr,
            seed=run.seed * 100 + COLD_START_STREAM,
            evaluation=scores,
            config=expert.sft,
            environments=expert.environments,
        )
        algorithm = "GRPO" if expert.rl.loss.beta else "GRPO without KL"
        reinforced = _reinforcement(
            run,
            number,
            name=f"{name}.rl",
            teaches=f"{algorithm}: {', '.join(expert.rl.environments)}",
            base=cold_start.name,
            config=expert.rl,
            evaluation=scores,
        )
        control = ControlStage(
            name=f"{name}.control",
            teaches=f"for comparison: fine-tuning as long as RL, {', '.join(expert.rl.environments)}",
            base=cold_start.name,
            tokens=reinforced.tokens - reinforced.tokens_before,
            sequence_length=expert.sft.sequence_length,
            learning_rate=expert.sft.peak_lr,
            seed=run.seed * 100 + CONTROL_STREAM,
            evaluation=EvalPlan(environments=tuple(dict.fromkeys(expert.rl.environments))),
            config=expert.sft,
            environments=expert.rl.environments,
            compared=reinforced.name,
        )
        stages += [cold_start, reinforced, control]
        answered = {environment: prompts[environment] for environment in expert.environments}
        teachers.append(Teacher(name, reinforced.name, answered))
    return [*stages, *_unification(run, base, tuple(teachers))]


def _learned(run: RunConfig) -> tuple[str, ...]:
    """Return the environments of all experts, in order."""
    experts = run.posttraining.experts()
    return tuple(name for _, expert in experts for name in expert.environments)


def _pretraining(run: RunConfig) -> list[PretrainStage]:
    """Plan the stages before post-training; the last one is also scored on the tasks that the experts will learn."""
    configs = dict(run.stages.items())
    planned = phases(run)
    stages = []
    base = None
    for phase in planned:
        is_last = phase is planned[-1]
        stage = PretrainStage(
            name=phase.name,
            teaches=configs[phase.name].teaches,
            base=base,
            tokens=phase.tokens,
            sequence_length=phase.sequence_length,
            learning_rate=run.optimizer.peak_lr,
            seed=run.seed * 100 + phase.start % 97,
            evaluation=EvalPlan(text=True, environments=_learned(run) if is_last else ()),
            config=configs[phase.name],
            phase=phase,
        )
        stages.append(stage)
        base = stage.name
    return stages


def _unification(
    run: RunConfig, base: str | None, teachers: tuple[Teacher, ...]
) -> list[UnifiedStage | RLStage]:
    """Plan the unified model and the two stages of RL that follow it (paper 3.1 stage two, 3.4)."""
    post = run.posttraining
    learned = _learned(run)
    last = TWELVE if run.evaluation.twelve else ()
    asking = environments_of(run)
    prompts = prompts_for(post, asking)
    answers = sum(prompts.values()) * post.responses_per_prompt
    answers *= 1 - post.drop_shortest
    tokens = sum(count * conversation_tokens([name], asking) for name, count in prompts.items())
    tokens *= post.responses_per_prompt * (1 - post.drop_shortest)
    tokens *= min(1, post.unified.samples / answers)
    unified = UnifiedStage(
        name="unified",
        teaches="the experts' right answers, with and without thinking",
        base=base,
        tokens=int(post.unified.epochs * tokens),
        sequence_length=post.unified.sequence_length,
        learning_rate=post.unified.peak_lr,
        seed=run.seed * 100 + DISTILLATION_STREAM,
        evaluation=EvalPlan(environments=learned, thinking=(True, False)),
        config=post.unified,
        teachers=teachers,
    )
    general = _reinforcement(
        run,
        len(teachers),
        name="general_rl",
        teaches="all tasks together",
        base=unified.name,
        config=post.general_rl,
        evaluation=EvalPlan(
            environments=learned, thinking=(True, False), brief=True, pathology=Moment.BEFORE
        ),
        thinking_share=post.thinking_share,
    )
    pathology = _reinforcement(
        run,
        len(teachers) + 1,
        name="pathology_rl",
        teaches="no mixing, no loops, no broken format",
        base=general.name,
        config=post.pathology_rl,
        evaluation=EvalPlan(
            environments=tuple(dict.fromkeys(learned + last)),
            thinking=(True, False),
            brief=True,
            pathology=Moment.AFTER,
        ),
        thinking_share=post.thinking_share,
    )
    return [unified, general, pathology]


def _reinforcement(
    run: RunConfig,
    number: int,
    *,
    name: str,
    teaches: str,
    base: str,
    config: RLConfig,
    evaluation: EvalPlan,
    thinking_share: float = 1.0,
) -> RLStage:
    """Plan a stage of RL. number: among the stages of RL, from 0; each draws tasks of its own."""
    episodes = float(config.steps * config.prompts * config.samples)
    asking = environments_of(run)
    screened = dict.fromkeys(config.environments)
    before = screening_answers(config) * conversation_tokens(screened, asking)
    tokens = 0.0
    kinds = provoking_kinds(run, config)
    if kinds:
        mined = config.mining.mined_share * episodes
        each = conversation_tokens(kinds, kinds)
        before += config.mining.drawn * each
        tokens += mined * each
        episodes -= mined
    tokens += episodes * conversation_tokens(config.environments, asking)
    return RLStage(
        name=name,
        teaches=teaches,
        base=base,
        tokens=int(before + tokens),
        sequence_length=config.max_new_tokens,
        learning_rate=config.peak_lr,
        seed=(run.seed * 100 + RL_STREAM) * 10 + number,
        evaluation=evaluation,
        config=config,
        thinking_share=thinking_share,
        tokens_before=int(before),
    )


def is_done(stage: Stage, stages: Sequence[Stage], checkpoints: CheckpointStore) -> bool:
    """Return whether a stage need not be trained.

    It is complete, or a later stage of pre-training is: an import leaves only the last of them.
    """
    if stage.kind != StageKind.PRETRAIN:
        return checkpoints.is_complete(stage.name)
    pretraining = [other.name for other in stages if other.kind == StageKind.PRETRAIN]
    later = pretraining[pretraining.index(stage.name) :]
    return any(checkpoints.is_complete(name) for name in later)


def prompts_for(post: PostTrainingConfig, asking: Environments = ENVIRONMENTS) -> dict[str, int]:
    """Return the prompts of each environment that its expert answers for the unified model.

    They are chosen by tokens: each environment gets as many tokens of solutions as `prompts_per_environment` of the shortest
    conversations have, times `distilled` of its expert. Without this rule the long conversations would fill the budget,
    and the short ones would be repeated until they are memorised. asking: the environments with the difficulties asked.
    """
    weights = {
        name: expert.distilled for _, expert in post.experts() for name in expert.environments
    }
    tokens = {name: conversation_tokens([name], asking) for name in weights}
    budget = post.prompts_per_environment * min(tokens.values())  # tokens for a weight of 1
    return {name: max(1, int(weights[name] * budget / tokens[name])) for name in weights}


def conversation_tokens(
    names: Iterable[str], asking: Mapping[str, Environment] = ENVIRONMENTS
) -> int:
    """Estimate the tokens of a conversation, as the mean over a few of the oracle's in these environments.

    asking: the environments with the difficulties that are asked.
    """
    texts = []
    for name in names:
        environment = asking[name]
        for task in environment.tasks(6, seed=0):
            texts.append(render_text(environment.demonstrate(task), task.tools))
    size = sum(len(text.encode()) for text in texts)
    return size // (BYTES_PER_TOKEN * max(1, len(texts)))


def expected_minutes(
    run: RunConfig, stages: Sequence[Stage], speed: float, device: str
) -> list[float]:
    """Return the minutes of each stage where matrix products have `speed` FLOP/s. device: cpu or cuda."""
    minutes = []
    for stage in stages:
        length = min(stage.sequence_length, PACKED_LENGTH)
        flops = stage.tokens * flops_per_token(run.model, length).total
        minutes.append(flops / (speed * UTILISATION[device]) / 60)
    return minutes


def table(run: RunConfig, stages: Sequence[Stage], speed: float, device: str) -> str:
    """Return the stages as text: tokens, length, peak learning rate, what each teaches, expected minutes.

    speed, device: as in `expected_minutes`.
    """
    rows = [("stage", "teaches", "tokens", "length", "peak rate", "minutes")]
    for stage, minutes in zip(stages, expected_minutes(run, stages, speed, device), strict=True):
        is_exact = stage.kind == StageKind.PRETRAIN
        row = (
            stage.name,
            stage.teaches,
            f"{'' if is_exact else '~'}{stage.tokens:,}",
            str(stage.sequence_length),
            f"{stage.learning_rate:g}",
            f"{minutes:.1f}" if minutes < 1e4 else f"{minutes:.0e}",
        )
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:2], widths)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:])]
        lines.append("  ".join([*words, *numbers]))
    notes = [note for stage in stages if (note := long_row(stage))]
    return "\n".join([f"{run.name}, config {run.hash()}", *lines, *notes])


def long_row(stage: Stage) -> str | None:
    """Return a line that says so where a step trains more tokens than the config asks for: it has at least one row."""
    match stage:
        case PretrainStage(phase=phase):
            tokens = max(
                phase.batch_tokens(seen) for seen in (phase.start, phase.start + phase.tokens)
            )
        case (
            ColdStartStage(config=config)
            | ControlStage(config=config)
            | UnifiedStage(config=config)
        ):
            tokens = config.batch_tokens
        case _:
            return None
    if tokens >= stage.sequence_length:
        return None
    return (
        f"{stage.name}: a step trains {stage.sequence_length:,} tokens, one row, "
        f"where {tokens:,} are configured (batch_tokens)"
    )
