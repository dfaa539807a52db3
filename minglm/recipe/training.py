"""Train one stage of a run, by its kind (paper 2.2 to 2.4, 3.1 to 3.4).

    PretrainStage     next-token prediction on a mixture of sources; the optimizer continues from the stage before
    ColdStartStage    fine-tuning on the oracle's solutions
    UnifiedStage      fine-tuning on the experts' right answers
    RLStage           GRPO without the KL term

Each function trains the model that it is given in place and returns what the stage's final checkpoint holds beside the
weights: the tokens trained on, and after pre-training the optimizer, which the next stage continues with.
"""

import sys
from contextlib import closing
from typing import Any, NamedTuple

from minglm.common.device import measured_flops, pick_dtype
from minglm.config import Packing, SFTConfig
from minglm.data.dialogues import examples
from minglm.data.mixture import Mixture
from minglm.envs import ENVIRONMENTS
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.plan.counts import flops_per_token
from minglm.recipe.context import RunContext
from minglm.recipe.conversations import (
    Conversations,
    cold_start_conversations,
    experts_answers,
    unified_conversations,
)
from minglm.recipe.evaluation import measure_bits
from minglm.recipe.stages import ColdStartStage, PretrainStage, RLStage, Stage, UnifiedStage
from minglm.report.records import (
    ConversationsRecord,
    RejectionRecord,
    RLRecord,
    read_records,
    select,
)
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.loop import TaskSchedule
from minglm.rl.loop import reinforce as reinforcement_loop
from minglm.rl.trainer import PolicyTrainer
from minglm.train import sft
from minglm.train.checkpoint_files import moments_of
from minglm.train.loop import LoopOptions, Phase, Trainer


class Trained(NamedTuple):
    """What the final checkpoint of a stage holds beside the weights."""

    tokens: int
    """Tokens trained on."""
    optimizer: Muon | None = None
    """The optimizer, where the next stage continues with it."""


def train_stage(context: RunContext, stage: Stage, model: GLM) -> Trained:
    """Train `model` on a stage, and return what its final checkpoint holds beside the weights."""
    match stage:
        case PretrainStage():
            return pretrain(context, stage, model)
        case ColdStartStage():
            return fine_tune(
                context, stage.name, stage.config, model, cold_start_conversations(stage)
            )
        case UnifiedStage():
            return unify(context, stage, model)
        case RLStage():
            return reinforce(context, stage, model)
        case _:
            raise TypeError(f"{stage.name}: a stage of an unknown kind, {stage.kind}")


def pretrain(context: RunContext, stage: PretrainStage, model: GLM) -> Trained:
    """Train on documents; weights and optimizer continue from the stage before (paper Figure 3)."""
    run = context.run
    model.rope_theta = stage.config.rope_theta
    optimizer = Muon(model, run.optimizer)
    if stage.base is not None:
        context.checkpoints.restore(stage.base, moments_of(model, optimizer))
    masks = {name: shard.masks for name, shard in context.shards.items()}
    stream = Mixture(
        context.shards,
        stage.config.mixture,
        stage.config.sequence_length,
        stage.config.packing,
        stage.seed,
        {name: mask for name, mask in masks.items() if mask is not None},
        context.tokenizer.pad,
    )
    _run_trainer(
        context,
        model,
        optimizer,
        stream,
        stage.phase,
        evaluate=lambda: measure_bits(context, stage, context.whole(model)),
        evaluate_every=run.evaluation.every_tokens,
    )
    return Trained(stage.phase.tokens, optimizer)


def fine_tune(
    context: RunContext, name: str, config: SFTConfig, model: GLM, conversations: Conversations
) -> Trained:
    """Fine-tune on conversations, each of them `config.epochs` times; sources are drawn by their tokens (paper 3.1).

    Examples longer than a row are left out, counted in the log. Raises ValueError where none is left.
    """
    tokens = {}
    masks = {}
    counts = {}
    too_long = {}
    for environment, group in conversations.items():
        found = [example for c in group for example in examples(context.tokenizer, *c)]
        fitting = [e for e in found if len(e.tokens_S) <= config.sequence_length]
        counts[environment] = len(found)
        if len(fitting) < len(found):
            too_long[environment] = len(found) - len(fitting)
        if fitting:
            tokens[environment] = tuple(example.tokens_S for example in fitting)
            masks[environment] = tuple(example.mask_S for example in fitting)
    if not tokens:
        raise ValueError(f"{name}: no conversation fits sequence_length = {config.sequence_length}")
    if not context.checkpoints.is_interrupted(name):  # a resumed stage has logged it already
        context.log.write(ConversationsRecord(stage=name, examples=counts, too_long=too_long))
    for environment, count in too_long.items() if context.world.is_writer else ():
        print(
            f"minglm: {name}: {count:,} of {counts[environment]:,} examples of {environment} are left out, "
            f"longer than sequence_length = {config.sequence_length:,}",
            file=sys.stderr,
        )
    weights = {environment: float(sum(map(len, group))) for environment, group in tokens.items()}
    phase = sft.phase(name, config, context.run, int(config.epochs * sum(weights.values())))
    stream = Mixture(
        tokens,
        weights,
        config.sequence_length,
        Packing.BEST_FIT,
        context.run.seed,
        masks,
        context.tokenizer.pad,
    )
    _run_trainer(context, model, Muon(model, context.run.optimizer), stream, phase)
    return Trained(phase.tokens)


def unify(context: RunContext, stage: UnifiedStage, model: GLM) -> Trained:
    """Train one hybrid model, from the base, on the experts' right answers (paper 3.1)."""
    answers, counts = experts_answers(context, stage)
    if not context.checkpoints.is_interrupted(stage.name):  # a resumed stage has logged it already
        context.log.write(RejectionRecord(counts=counts))
    conversations = unified_conversations(context, stage, answers)
    return fine_tune(context, stage.name, stage.config, model, conversations)


def reinforce(context: RunContext, stage: RLStage, model: GLM) -> Trained:
    """Train by GRPO on the tasks of an expert, or on the mix of a general stage (paper 3.2 to 3.4)."""
    run = context.run
    config = stage.config
    trainer = PolicyTrainer(
        model,
        Muon(model, run.optimizer),
        config,
        run.optimizer,
        context.tokenizer.pad,
        context.workers(model),
    )
    settings = SamplingSettings(
        config.max_new_tokens, config.temperature, max_turns=config.max_turns
    )
    schedule = TaskSchedule(
        ENVIRONMENTS,
        config.environments,
        config.prompts,
        seed=stage.seed,
        thinking_share=stage.thinking_share,
    )
    checkpoints = context.checkpoints.stage(stage.name)
    with closing(context.rollout_generator(model)) as generator:
        player = Player(generator, context.tokenizer, settings, context.world.ranks)
        reinforcement_loop(
            trainer, player, schedule, checkpoints, context.log, stage.name, context.quiet
        )

    def tokens_in_log() -> int:
        records = select(read_records(context.log.path), RLRecord, stage=stage.name)
        return sum(record.segment_tokens or 0 for record in records)

    return Trained(context.world.ranks.first(tokens_in_log))


def _run_trainer(
    context: RunContext, model: GLM, optimizer: Muon, stream: Mixture, phase: Phase, **options: Any
) -> None:
    """Run the training loop with this run's log and its device's ceiling. options: other fields of `LoopOptions`."""
    dtype = pick_dtype(context.run.dtype, context.device)
    flops = measured_flops(context.device, dtype) * context.threads * context.world.size
    ceiling = flops / flops_per_token(context.run.model, phase.sequence_length).total
    loop_options = LoopOptions(
        quiet=context.quiet, ceiling=ceiling, workers=context.workers(model), **options
    )
    checkpoints = context.checkpoints.stage(phase.name)
    Trainer(model, optimizer, stream, phase, checkpoints, context.log, loop_options).run()
