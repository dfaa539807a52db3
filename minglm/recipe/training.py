"""Train one stage of a run, by its kind (paper 2.2 to 2.4, 3.1 to 3.4).

    PretrainStage     next-token prediction on a mixture of sources; the optimizer continues from the stage before
    ColdStartStage    fine-tuning on the oracle's solutions
    ControlStage      the same for as many tokens as RL was trained on, to compare RL with
    UnifiedStage      fine-tuning on the experts' right answers, on-policy distillation from them, or their mean
    RLStage           GRPO

Each function trains the model that it is given in place and returns what the stage's final checkpoint holds beside the
weights: the tokens trained on, and after pre-training the optimizer, which the next stage continues with.
"""

import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from tqdm import tqdm

from minglm.common.device import measured_flops, pick_dtype
from minglm.common.signals import Stopped, stop_between_steps
from minglm.common.statistics import interval
from minglm.common.threads import threads_in_use
from minglm.config import Packing, RolloutPrecision, SFTConfig, Unification
from minglm.config.posttraining import RolloutScheduler, WeightTransport
from minglm.data.mixture import POOL_BATCHES, Mixture
from minglm.inference.client import Generator
from minglm.inference.scoring import Scorer
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.recipe.context import RunContext
from minglm.recipe.conversations import (
    Examples,
    experts_answers,
    fitting,
    shown_conversations,
    unified_conversations,
)
from minglm.recipe.evaluation import measure_bits_during
from minglm.recipe.inputs import provoking_kinds
from minglm.recipe.preferences import grader_of
from minglm.recipe.stages import (
    ColdStartStage,
    ControlStage,
    PretrainStage,
    RLStage,
    Stage,
    UnifiedStage,
)
from minglm.report.records import (
    ConversationsRecord,
    MiningRecord,
    OnPolicyRecord,
    RejectionRecord,
    RLRecord,
    ScreeningRecord,
    read_records,
    select,
)
from minglm.rl.async_loop import Disaggregated
from minglm.rl.curriculum import Curriculum, Problem
from minglm.rl.endpoint import Endpoint
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.grading import grade
from minglm.rl.loop import Rollouts, Synchronous
from minglm.rl.loop import reinforce as reinforcement_loop
from minglm.rl.mining import has_fault, mine
from minglm.rl.pool import LocalPool
from minglm.rl.ray_pool import RayPool
from minglm.rl.recorded import Recorded, record
from minglm.rl.rollout import rollout
from minglm.rl.samples import SampleFile
from minglm.rl.schedule import TaskSchedule
from minglm.rl.screening import Screener, screen
from minglm.rl.trainer import PolicyTrainer
from minglm.rl.unify import Distiller, average_into
from minglm.rl.weights import BroadcastChannel, Channel, FileChannel
from minglm.rl.worker import EngineSetup, WorkerSetup
from minglm.train import sft
from minglm.train.checkpoint_files import moments_of
from minglm.train.loop import LoopOptions, Phase, Trainer
from minglm.train.state import TrainingState

FIRST_SOLUTIONS = 64
"""Solutions of each environment that tell how long one is."""
SPARE = 1.05
"""Solutions that are drawn, over those that their mean length asks for."""
DRAWN_AHEAD = POOL_BATCHES + 2
"""Batches that a mixture may draw beyond those trained on: its pool, the last one's rest, and a document of each source."""
NOTHING_PROVOKES = "no prompt provoked a fault: all prompts come from the environments"


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
            environments = [context.environments[name] for name in stage.environments]
            config = stage.config
            conversations = shown_conversations(environments, config.samples, stage.seed)
            solutions = fitting(context.tokenizer, conversations, config.sequence_length)
            return fine_tune(context, stage.name, config, model, solutions)
        case ControlStage():
            return train_control(context, stage, model)
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
        evaluate=lambda: measure_bits_during(context, stage, model),
        evaluate_every=run.evaluation.every_tokens,
    )
    return Trained(stage.phase.tokens, optimizer)


def fine_tune(
    context: RunContext,
    name: str,
    config: SFTConfig,
    model: GLM,
    found: Examples,
    budget: int | None = None,
) -> Trained:
    """Fine-tune on examples, each of them `config.epochs` times; sources are drawn by their tokens (paper 3.1).

    budget: tokens to train on, in place of the epochs. Examples longer than a row are left out, counted in the log.
    Raises ValueError where none is left.
    """
    if not found.tokens:
        raise ValueError(f"{name}: no conversation fits sequence_length = {config.sequence_length}")
    if not context.checkpoints.is_interrupted(name):  # a resumed stage has logged it already
        record = ConversationsRecord(
            stage=name, examples=found.counts, too_long=found.too_long, tokens=found.sizes
        )
        context.log.write(record)
    for environment, count in found.too_long.items() if context.world.is_writer else ():
        print(
            f"minglm: {name}: {count:,} of {found.counts[environment]:,} examples of {environment} are left out, "
            f"longer than sequence_length = {config.sequence_length:,}",
            file=sys.stderr,
        )
    sizes = found.sizes
    total = int(config.epochs * sum(sizes.values())) if budget is None else budget
    phase = sft.phase(name, config, context.run, total)
    stream = Mixture(
        found.tokens,
        sizes,
        config.sequence_length,
        Packing.BEST_FIT,
        context.run.seed,
        found.masks,
        context.tokenizer.pad,
    )
    _run_trainer(context, model, Muon(model, context.run.optimizer), stream, phase)
    return Trained(phase.tokens)


def train_control(context: RunContext, stage: ControlStage, model: GLM) -> Trained:
    """Fine-tune the start of a stage of RL on solutions that are new to it, for as many tokens as RL was trained on.

    It sees no solution twice. Where RL was trained on nothing (no group had a signal), neither is its control.
    """
    budget = context.world.ranks.first(lambda: trained_by_rl(context, stage.compared))
    if not budget:
        return Trained(0)
    config = stage.config
    step = max(config.batch_tokens, config.sequence_length)
    solutions = solutions_of(context, stage, budget + DRAWN_AHEAD * step)
    return fine_tune(context, stage.name, config, model, solutions, budget)


def solutions_of(context: RunContext, stage: ControlStage, tokens: int) -> Examples:
    """Return solutions with at least so many tokens in all; none where none fits a row."""
    environments = [context.environments[name] for name in stage.environments]
    samples = FIRST_SOLUTIONS
    while True:
        conversations = shown_conversations(environments, samples, stage.seed)
        found = fitting(context.tokenizer, conversations, stage.config.sequence_length)
        size = sum(found.sizes.values())
        if size >= tokens or not size:
            return found
        samples = math.ceil(SPARE * samples * tokens / size)


def unify(context: RunContext, stage: UnifiedStage, model: GLM) -> Trained:
    """Make one model of the experts, from the base, in the way that the config names (paper 3.1)."""
    match context.run.posttraining.unification:
        case Unification.AVERAGE:
            average_into(model, [context.load_model(teacher.stage) for teacher in stage.teachers])
            return Trained(0)
        case Unification.ON_POLICY:
            return distill_on_policy(context, stage, model)
    answers, counts = experts_answers(context, stage)
    if not context.checkpoints.is_interrupted(stage.name):  # a resumed stage has logged it already
        context.log.write(RejectionRecord(counts=counts))
    conversations = unified_conversations(context, stage, answers)
    found = fitting(context.tokenizer, conversations, stage.config.sequence_length)
    return fine_tune(context, stage.name, stage.config, model, found)


def distill_on_policy(context: RunContext, stage: UnifiedStage, model: GLM) -> Trained:
    """Let the model answer the experts' tasks, with thinking, and let the expert of each task judge every token.

    It ends after as many tokens as fine-tuning on the experts' answers is planned to have.
    """
    run = context.run
    config = run.posttraining.general_rl
    experts = {}
    for teacher in stage.teachers:
        experts |= dict.fromkeys(teacher.prompts, context.load_model(teacher.stage))
    optimizer = Muon(model, run.optimizer)
    distiller = Distiller(
        model,
        optimizer,
        experts,
        config.peak_lr,
        run.optimizer.clip_norm,
        context.tokenizer.pad,
        context.workers(model),
    )
    state = TrainingState(model, optimizer, distiller.guard)
    checkpoints = context.checkpoints.stage(stage.name)
    state.restore(checkpoints)
    schedule = TaskSchedule(context.environments, tuple(experts), config.prompts, stage.seed)
    settings = SamplingSettings(config.max_new_tokens, max_turns=config.max_turns)
    bar = tqdm(initial=state.tokens, total=stage.tokens, desc=stage.name, disable=context.quiet)
    with (
        stop_between_steps(distiller.workers.agree) as stop,
        closing(context.rollout_generator(model)) as generator,
        bar,
    ):
        player = Player(generator, context.tokenizer, settings, context.world.ranks)
        while state.tokens < stage.tokens:
            began = time.perf_counter()
            drawn = schedule.draw(state.step)
            seed = schedule.rollout_seed(state.step)
            groups = rollout(player, context.environments, drawn.tasks, config.samples, seed=seed)
            answers = [trajectory for group in groups for trajectory in group]
            if not any(trajectory.length for trajectory in answers):
                raise ValueError(
                    f"stage {stage.name}, step {state.step + 1}: every environment failed: {answers[0].score.detail}"
                )
            with distiller.workers.watched(f"stage {stage.name}, step {state.step + 1}"):
                found = distiller.learn(answers, state.step)
            state.step += 1
            state.tokens += found.segment_tokens
            generator.update_weights(distiller.workers.weights(), state.step)
            record = OnPolicyRecord(
                stage=stage.name,
                step=state.step,
                tokens=state.tokens,
                reverse_kl=found.reverse_kl,
                grad_norm=found.grad_norm,
                seconds=round(time.perf_counter() - began, 3),
            )
            context.log.write(record)
            bar.update(found.segment_tokens)
            try:
                stop()
            except Stopped:
                state.save(checkpoints)
                raise
            if distiller.workers.agree(checkpoints.due()):  # the clocks of ranks differ
                state.save(checkpoints, background=True)
    return Trained(state.tokens)


def reinforce(context: RunContext, stage: RLStage, model: GLM) -> Trained:
    """Train by GRPO on the tasks of an expert, or on the mix of a general stage (paper 3.2 to 3.4).

    What the context asks for in place of that: only the rollouts, or training on recorded ones.
    """
    run = context.run
    config = stage.config
    trainer = PolicyTrainer(
        model,
        Muon(model, run.optimizer),
        config,
        run.optimizer,
        context.tokenizer.pad,
        context.workers(model),
        context.load_model(stage.base) if config.loss.beta else None,
        Scorer(model) if config.exact else None,
        run.balance,
    )
    trainer.grader = grader_of(context, stage, model)
    settings = SamplingSettings(
        config.max_new_tokens, config.temperature, max_turns=config.max_turns
    )
    schedule = TaskSchedule(
        context.environments,
        config.environments,
        config.prompts,
        seed=stage.seed,
        thinking_share=stage.thinking_share,
        refill=config.refill,
    )
    checkpoints = context.checkpoints.stage(stage.name)
    with contextlib.ExitStack() as stack:
        generator = stack.enter_context(
            closing(context.rollout_generator(model, config.routing_replay))
        )
        outside = endpoint_of(context, stage, generator)
        if outside is not None:
            stack.enter_context(closing(outside))
        player = Player(generator, context.tokenizer, settings, context.world.ranks, outside)
        if config.curriculum.pool:
            schedule = replace(schedule, curriculum=curriculum_of(context, stage, player))
        elif config.mining.kinds:
            provoking = provoking_of(context, stage, player)
            schedule = replace(schedule, chosen=provoking, chosen_share=config.mining.mined_share)
        samples = sample_file(context, stage)
        rollouts: Rollouts = Synchronous(trainer, player, schedule)
        if context.from_rollouts is not None:
            rollouts = Recorded(context.from_rollouts, sample_head(context, stage), schedule)
            samples = None  # they would be the same, and may be that very file
        elif config.asynchronous.workers:
            rollouts = stack.enter_context(
                closing(disaggregated(context, stage, trainer, player, schedule))
            )
        if context.rollout_only:
            assert samples is not None, "one rank rolls out for a record"
            record(rollouts, config.steps, samples, context.quiet)
            return Trained(0)
        reinforcement_loop(
            trainer,
            player,
            schedule,
            checkpoints,
            context.log,
            stage.name,
            context.quiet,
            rollouts,
            samples,
            context.run.keep_samples,
        )
    return Trained(context.world.ranks.first(lambda: trained_by_rl(context, stage.name)))


def sample_file(context: RunContext, stage: RLStage) -> SampleFile | None:
    """Return where the samples of a stage are kept; None on ranks that write nothing."""
    if not context.world.is_writer:
        return None
    folder = context.out / ("rollouts" if context.rollout_only else "samples")
    return SampleFile(folder / f"{stage.name}.jsonl", sample_head(context, stage))


def sample_head(context: RunContext, stage: RLStage) -> dict[str, Any]:
    """Return what the samples of a stage depend on, beside the weights."""
    config = stage.config
    head = {"stage": stage.name, "seed": stage.seed, "tokenizer": context.tokenizer.fingerprint}
    return head | {"prompts": config.prompts, "samples": config.samples}


def disaggregated(
    context: RunContext,
    stage: RLStage,
    trainer: PolicyTrainer,
    player: Player,
    schedule: TaskSchedule,
) -> Disaggregated:
    """Start the processes that roll out for a stage, on the rank that has them."""
    run = context.run
    asked = stage.config.asynchronous
    float8 = run.rollouts == RolloutPrecision.FLOAT8
    if not context.world.is_writer:
        return Disaggregated(trainer, schedule, None, None, float8, context.world.ranks)
    make_generator = EngineSetup(
        run.model,
        context.tokenizer,
        str(context.device),
        trainer.model.dtype,
        run.kernels,
        asked.partial,
        {
            "experts": run.rollouts,
            "draft_tokens": run.draft_tokens,
            "keep_choices": stage.config.routing_replay,
        },
    )
    setup = WorkerSetup(
        make_generator,
        context.tokenizer,
        player.settings,
        schedule.environments,
        stage.config.samples,
    )
    pool: LocalPool | RayPool
    if asked.scheduler == RolloutScheduler.RAY:
        gpus = int(context.device.type == "cuda")
        pool = RayPool(setup, asked.workers, asked.transport, gpus, asked.idle_seconds)
    else:
        pool = LocalPool(setup, asked.workers, asked.idle_seconds)
    channel: Channel
    match asked.transport:
        case WeightTransport.BROADCAST:
            channel = BroadcastChannel(pool.host)
        case WeightTransport.FILE:
            channel = FileChannel(context.out / "weights")
        case _:
            channel = FileChannel()
    give_reward = None
    if trainer.grader is not None:
        give_reward = partial(grade, trainer.grader, schedule.environments, context.tokenizer)
    ranks = context.world.ranks
    return Disaggregated(trainer, schedule, pool, channel, float8, ranks, give_reward)


def endpoint_of(context: RunContext, stage: RLStage, generator: Generator) -> Endpoint | None:
    """Return the endpoint where outside agents play the tasks of a stage; None where the stage has none.

    Each rank has one of its own, on the port of the config plus its number.
    """
    outside = stage.config.outside
    if not outside.on:
        return None
    if outside.port:
        outside = replace(outside, port=outside.port + context.world.rank)
    folder = context.out / "agents" / stage.name
    endpoint = Endpoint(outside, context.tokenizer, generator.max_model_len, folder)
    if not context.quiet:
        print(f"minglm: {stage.name}: outside agents play at {endpoint.url}", file=sys.stderr)
    return endpoint


def curriculum_of(context: RunContext, stage: RLStage, player: Player) -> Curriculum:
    """Screen the problems of a stage, unless that was done before; the counts are kept in data/screening_STAGE.json."""
    began = time.perf_counter()
    config = stage.config.curriculum
    quiet = context.quiet or not context.world.is_writer
    with tqdm(desc=f"{stage.name}, screening", unit="answer", disable=quiet or None) as bar:
        path = context.out / "data" / f"screening_{stage.name}.json"
        screener = Screener(
            player, context.environments, stage.seed, path, bar, context.world.is_writer
        )
        names = stage.config.environments
        tiers, rates, held_out = screen(screener, names, config, stage.thinking_share)
    if not context.checkpoints.is_interrupted(stage.name):  # a resumed stage has logged it already
        again = [rate.rate for rate in rates if rate.second]
        record = ScreeningRecord(
            stage=stage.name,
            tiers={tier: sum(map(len, found.values())) for tier, found in tiers.items()},
            answers=sum(rate.first + rate.second for rate in rates),
            pass_rate=with_interval([rate.rate for rate in rates]),
            extreme_rate=with_interval(again) if again else None,
            held_out=len(held_out),
            seconds=round(time.perf_counter() - began, 3),
        )
        context.log.write(record)
    return Curriculum(config, stage.config.steps, names, tiers, held_out, stage.seed)


def provoking_of(context: RunContext, stage: RLStage, player: Player) -> list[Problem]:
    """Mine the prompts that provoke faults, unless that was done before; counts are kept in data/mining_STAGE.json."""
    began = time.perf_counter()
    config = stage.config.mining
    kinds = provoking_kinds(context.run, stage.config)
    quiet = context.quiet or not context.world.is_writer
    with tqdm(desc=f"{stage.name}, mining", unit="answer", disable=quiet or None) as bar:
        path = context.out / "data" / f"mining_{stage.name}.json"
        writes = context.world.is_writer
        screener = Screener(player, kinds, stage.seed, path, bar, writes, has_fault)
        mined = mine(screener, config, stage.thinking_share)
    if not context.checkpoints.is_interrupted(stage.name):  # a resumed stage has logged it already
        answers = sum(count.answers for count in mined.counts)
        record = MiningRecord(
            stage=stage.name,
            asked=by_environment(mined.asked),
            provoking=by_environment(mined.provoking),
            answers=answers,
            faulty=sum(count.counted for count in mined.counts) / max(1, answers),
            note=None if mined.provoking else NOTHING_PROVOKES,
            seconds=round(time.perf_counter() - began, 3),
        )
        context.log.write(record)
    return mined.provoking


def by_environment(problems: Sequence[Problem]) -> dict[str, int]:
    """Return how many problems each environment has."""
    return dict(Counter(problem.task.environment for problem in problems))


def with_interval(rates: Sequence[float]) -> list[float]:
    """Return the mean of some rates and both ends of its 95% interval, rounded; nothing without rates."""
    if not rates:
        return []
    return [round(number, 4) for number in (fmean(rates), *interval(rates))]


def trained_by_rl(context: RunContext, stage: str) -> int:
    """Return the tokens that a stage of RL was trained on, from the log: its segments with their prompts."""
    records = select(read_records(context.log.path), RLRecord, stage=stage)
    return sum(record.segment_tokens or 0 for record in records)


def _run_trainer(
    context: RunContext, model: GLM, optimizer: Muon, stream: Mixture, phase: Phase, **options: Any
) -> None:
    """Run the training loop with this run's log and the speed of its devices. options: other fields of `LoopOptions`."""
    dtype = pick_dtype(context.run.dtype, context.device)
    peak = measured_flops(context.device, dtype, threads_in_use()) * context.world.size
    loop_options = LoopOptions(
        quiet=context.quiet, peak_flops=peak, workers=context.workers(model), **options
    )
    checkpoints = context.checkpoints.stage(phase.name)
    Trainer(model, optimizer, stream, phase, checkpoints, context.log, loop_options).run()
