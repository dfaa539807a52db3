"""Measure what a stage taught, as its evaluation plan says (paper 2.3, 3.4, 4)."""

from collections.abc import Sequence
from contextlib import closing

from minglm.chat import render_text
from minglm.envs import ENVIRONMENTS
from minglm.envs.pathology import PathologyPrompts
from minglm.eval import needles, tasks
from minglm.eval.text import bits_per_byte, mtp_acceptance
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator, Generator
from minglm.model.glm import GLM
from minglm.recipe.context import RunContext
from minglm.recipe.stages import Stage
from minglm.report.records import (
    BitsPerByteRecord,
    EvaluationRecord,
    MTPAcceptanceRecord,
    PathologyRecord,
    SampleRecord,
)
from minglm.rl.episode import Trajectory

HELDOUT_SOURCES = ("prose", "code")
LONGEST_ROW = 1024  # tokens of a row of held-out text; most documents are shorter


def evaluate(context: RunContext, stage: Stage, model: GLM) -> None:
    """Log the measurements of a stage's evaluation plan. Ranks divide the episodes; each reads all of the text."""
    plan = stage.evaluation
    model = context.whole(model)
    if plan.text:
        measure_text(context, stage, model)
    with closing(EngineGenerator(Engine(model, context.tokenizer))) as generator:
        score(context, generator, stage.name, plan.environments, plan.thinking)
        if plan.pathology is not None:
            played = score(context, generator, stage.name, [PathologyPrompts.name], plan.thinking)
            record = PathologyRecord(stage=stage.name, when=plan.pathology, **tasks.faults(played))
            context.log.write(record)


def measure_text(context: RunContext, stage: Stage, model: GLM) -> None:
    """Log bits per byte, the acceptance of the MTP layer's drafts, and needles after a stage with longer rows."""
    length = measure_bits(context, stage, model)
    code = context.heldout.get("code", ())
    if model.mtp is not None and len(code):
        value = mtp_acceptance(model, code, length, context.run.evaluation.heldout_tokens)
        context.log.write(MTPAcceptanceRecord(stage=stage.name, value=value))
    for record in needles.measure(
        model, context.tokenizer, context.heldout, context.run, stage.name
    ):
        context.log.write(record)


def measure_bits(context: RunContext, stage: Stage, model: GLM) -> int:
    """Log the bits per byte of every held-out source. Return the length of the rows."""
    length = min(stage.sequence_length, LONGEST_ROW)
    limit = context.run.evaluation.heldout_tokens
    for source in HELDOUT_SOURCES:
        documents = context.heldout.get(source, ())
        if len(documents):
            value = bits_per_byte(model, context.tokenizer, documents, length, limit)
            context.log.write(BitsPerByteRecord(stage=stage.name, source=source, value=value))
    return length


def score(
    context: RunContext,
    generator: Generator,
    stage: str,
    environments: Sequence[str],
    switches: Sequence[bool],
) -> list[Trajectory]:
    """Score environments under settings of the thinking switch; log scores and samples. Return all episodes."""
    everything = []
    for name in environments:
        for thinking in switches:
            record, played = tasks.tasks(
                generator,
                context.tokenizer,
                ENVIRONMENTS[name],
                context.run.evaluation,
                thinking,
                context.run.seed,
                context.world.ranks,
            )
            context.log.write(EvaluationRecord(stage=stage, **record))
            mode = "thinking" if thinking else "direct"
            text = render_text(played[0].messages, None, thinking)
            context.log.write(SampleRecord(stage=stage, title=f"{name}, {mode}", text=text))
            everything += played
    return everything
