"""Measure what a stage taught, as its evaluation plan says (paper 2.3, 3.4, 4)."""

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from minglm.chat import render_text
from minglm.envs.base import Environment
from minglm.eval import needles, pathologies, tasks
from minglm.eval.pathologies import Auditor
from minglm.eval.text import bits_per_byte, mtp_acceptance, mtp_acceptance_on_answers
from minglm.inference.client import Generator
from minglm.model.glm import GLM
from minglm.parallel.reading import Reader
from minglm.recipe.context import RunContext
from minglm.recipe.inputs import provoking_kinds
from minglm.recipe.stages import Stage
from minglm.report.records import (
    BitsPerByteRecord,
    EvaluationRecord,
    Moment,
    MTPAcceptanceRecord,
    PathologyRecord,
    SampleRecord,
)
from minglm.rl.episode import Trajectory
from minglm.rl.mining import has_fault

HELDOUT_SOURCES = ("prose", "code")
LITTLE_TEXT = 8192  # tokens for the acceptance of drafts after a stage of which text is not measured otherwise
MOST_ANSWERS = 64  # episodes for the acceptance of drafts on tasks
AUDIT_SEED = 17  # of the clean texts that an audit compares with
LONGEST_ROW = 1024  # tokens of a row of held-out text; most documents are shorter


def evaluate(context: RunContext, stage: Stage, model: GLM) -> None:
    """Log the measurements of a stage's evaluation plan. Ranks divide episodes and text.

    Text is read with the model as the ranks share it. Answers come from the engine of the rollouts where there is one;
    otherwise each rank gathers a copy to generate with.
    """
    plan = stage.evaluation
    with context.reading(model) as reader:
        if plan.text:
            measure_text(context, stage, reader)
        elif plan.environments:
            measure_acceptance(context, stage, reader, LITTLE_TEXT)
    if not plan.environments:
        return
    refusal = context.why_no_copy()
    if refusal:  # what was trained is worth more than its scores
        if context.world.is_writer:
            print(f"minglm: {stage.name}: no task is scored: {refusal}", file=sys.stderr)
        return
    answers = measure_tasks(context, stage, model)
    with context.reading(model) as reader:
        measure_acceptance_on_tasks(context, stage, reader, answers)


def measure_tasks(context: RunContext, stage: Stage, model: GLM) -> list[Trajectory]:
    """Log scores, and the incidence of pathologies where the plan asks for it. Return the episodes of the tasks."""
    plan = stage.evaluation
    with closing(context.evaluation_generator(model)) as generator:
        answers = score(context, generator, stage, plan.environments)
        if plan.pathology is not None:
            measure_pathologies(context, generator, stage, plan.pathology)
    return answers


def measure_pathologies(
    context: RunContext, generator: Generator, stage: Stage, when: Moment
) -> None:
    """Log faults, flags and content of answers to held-out prompts of the kinds that pathology RL mines; and faulty samples."""
    kinds = provoking_kinds(context.run, context.run.posttraining.pathology_rl)
    if not kinds:
        return
    played = []
    problems = context.run.evaluation.provoking_problems
    for name, environment in kinds.items():
        answers = []
        for thinking in stage.evaluation.thinking:
            answers += play(context, generator, environment, thinking, problems).trajectories
        faulty = next((answer for answer in answers if has_fault(answer)), None)
        if faulty is not None:
            text = render_text(faulty.messages, None, faulty.thinking)
            title = f"{name}, an answer with a fault"
            context.log.write(SampleRecord(stage=stage.name, title=title, text=text))
        played += answers
    found = pathologies.measure(played, Auditor(kinds.values(), AUDIT_SEED))
    context.log.write(PathologyRecord(stage=stage.name, when=when, **found))


def measure_text(context: RunContext, stage: Stage, reader: Reader) -> None:
    """Log bits per byte, the acceptance of the MTP layer's drafts, and needles after a stage with longer rows."""
    measure_bits(context, stage, reader)
    measure_acceptance(context, stage, reader, context.run.evaluation.heldout_tokens)
    for record in needles.measure(
        reader.model, context.tokenizer, context.heldout, context.run, stage.name, reader.ranks
    ):
        context.log.write(record)


def measure_acceptance(context: RunContext, stage: Stage, reader: Reader, tokens: int) -> None:
    """Log the acceptance of the MTP layer's drafts on so many tokens of held-out code, where there are both."""
    code = context.heldout.get("code", ())
    if reader.model.mtp is None or not len(code):
        return
    length = min(stage.sequence_length, LONGEST_ROW)
    limit = min(tokens, context.run.evaluation.heldout_tokens)
    value = mtp_acceptance(reader.model, code, length, limit, reader.ranks)
    context.log.write(MTPAcceptanceRecord(stage=stage.name, value=value))


def measure_acceptance_on_tasks(
    context: RunContext, stage: Stage, reader: Reader, played: Sequence[Trajectory]
) -> None:
    """Log the acceptance of the MTP layer's drafts on the model's own answers, spread over all tasks."""
    if reader.model.mtp is None:
        return
    step = max(1, len(played) // MOST_ANSWERS)
    answers = []
    for trajectory in played[::step]:
        for segment in trajectory.segments:
            if sum(segment.mask) > 1:
                answers.append((np.array(segment.tokens), np.array(segment.mask)))
    limit = context.run.evaluation.heldout_tokens
    value = mtp_acceptance_on_answers(reader.model, answers, limit, reader.ranks)
    if value is not None:
        context.log.write(MTPAcceptanceRecord(stage=stage.name, on="tasks", value=value))


def measure_bits_during(context: RunContext, stage: Stage, model: GLM) -> None:
    """Log the bits per byte in the middle of a stage."""
    with context.reading(model) as reader:
        measure_bits(context, stage, reader)


def measure_bits(context: RunContext, stage: Stage, reader: Reader) -> None:
    """Log the bits per byte of every held-out source."""
    length = min(stage.sequence_length, LONGEST_ROW)
    limit = context.run.evaluation.heldout_tokens
    for source in HELDOUT_SOURCES:
        documents = context.heldout.get(source, ())
        if len(documents):
            value = bits_per_byte(
                reader.model, context.tokenizer, documents, length, limit, reader.ranks
            )
            context.log.write(BitsPerByteRecord(stage=stage.name, source=source, value=value))


def score(
    context: RunContext, generator: Generator, stage: Stage, environments: Sequence[str]
) -> list[Trajectory]:
    """Score environments under the stage's settings of the switch; log scores and samples. Return all episodes."""
    everything = []
    config = context.run.evaluation
    brief = min(config.problems, config.brief_problems)
    for name in environments:
        environment = context.environments[name]
        for thinking in stage.evaluation.thinking:
            problems = brief if stage.evaluation.brief or not thinking else config.problems
            record, played = play(context, generator, environment, thinking, problems)
            context.log.write(EvaluationRecord(stage=stage.name, **record))
            mode = "thinking" if thinking else "direct"
            text = render_text(played[0].messages, None, thinking)
            context.log.write(SampleRecord(stage=stage.name, title=f"{name}, {mode}", text=text))
            everything += played
    return everything


def play(
    context: RunContext,
    generator: Generator,
    environment: Environment,
    thinking: bool,
    problems: int,
) -> tasks.Evaluation:
    """Play so many held-out tasks of an environment."""
    return tasks.tasks(
        generator,
        context.tokenizer,
        environment,
        replace(context.run.evaluation, problems=problems),
        thinking,
        context.run.seed,
        context.world.ranks,
    )
