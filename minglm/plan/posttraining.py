"""Estimate the time of post-training, stage by stage (paper 3.1 to 3.4).

    tokens = conversations * tokens of one;    days = tokens / (tokens a second of a training step)

How long a model thinks is its own choice, so a conversation is assumed to have between a tenth and a half of
the longest answer that the stage allows (`ANSWERS`); further turns are not counted. A token that is sampled
is assumed to cost as much as one that is trained on, and each token of reinforcement learning is counted
once, as `minglm.recipe.stages` does; so are the answers before the first step, of mining and of screening
(`minglm.plan.screening`). Everything else is the arithmetic of pre-training, with the stage's own
batches: GPUs that get no row of a small one idle.

An engine in the process of a rank answers with a whole copy of the weights, so that what trains may fit and
what generates not. Its cache is not counted. An engine of its own, on other GPUs (`rollout_engine`), takes
nothing.
"""

from dataclasses import dataclass, replace

from minglm.config.parallel import Layout
from minglm.config.posttraining import RLConfig, SFTConfig
from minglm.config.run import RolloutPrecision, RunConfig
from minglm.plan.counts import count_parameters
from minglm.plan.gpus import GPU, USABLE
from minglm.plan.layout import layout_for, without_pipeline
from minglm.plan.memory import GIB, Fit, compute_bytes, fit
from minglm.plan.screening import screening_answers
from minglm.plan.speed import EXPECTED, step_time

ANSWERS = (0.1, 0.5)
"""Tokens of a conversation over the longest answer: assumed, shortest and longest."""


@dataclass(frozen=True)
class PostTrainingPlan:
    """One stage of post-training in a layout."""

    name: str
    tokens: tuple[float, float]
    """Sampled or trained on, fewest and most."""
    sequence_length: int
    """Positions of a row; of reinforcement learning the longest answer."""
    cp: int
    """GPUs that share a row."""
    memory: int
    """Bytes of one GPU, the engine included."""
    engine: int
    """Bytes of it that are the whole copy of the weights to generate with; 0 where nothing here does, or unsharded."""
    fits: bool
    tokens_per_second_per_gpu: tuple[float, float]
    days: tuple[float, float]
    gpu_hours: tuple[float, float]


def posttraining_layouts(run: RunConfig, layout: Layout) -> list[tuple[str, Layout]]:
    """Return the stages of post-training in order, each with its layout: no pipeline, and rows cut where they are long."""
    flat = without_pipeline(run, layout)
    found: list[tuple[str, Layout]] = []
    for name, expert in run.posttraining.experts():
        tuned = layout_for(run, flat, expert.sft.sequence_length)
        answers = layout_for(run, flat, expert.rl.max_new_tokens)
        found += [(f"{name}.sft", tuned), (f"{name}.rl", answers)]
        found.append((f"{name}.control", tuned))
    found.append(("unified", layout_for(run, flat, run.posttraining.unified.sequence_length)))
    for name in ("general_rl", "pathology_rl"):
        answers = run.posttraining.reinforcements()[name].max_new_tokens
        found.append((name, layout_for(run, flat, answers)))
    return found


def plan_posttraining(run: RunConfig, layout: Layout, gpu: GPU) -> list[PostTrainingPlan]:
    """Plan every stage of post-training."""
    stages = {**run.posttraining.fine_tunings(), **run.posttraining.reinforcements()}
    stages |= {f"{name}.control": expert.sft for name, expert in run.posttraining.experts()}
    return [
        _plan_stage(run, name, stages[name], own, gpu)
        for name, own in posttraining_layouts(run, layout)
    ]


def why_no_posttraining(run: RunConfig, layout: Layout, gpu: GPU) -> str | None:
    """Return one line: which stages do not fit, why, and what would do; None where all do."""
    failing = [stage for stage in plan_posttraining(run, layout, gpu) if not stage.fits]
    if not failing:
        return None
    worst = max(failing, key=lambda stage: stage.memory)
    usable = USABLE * gpu.memory_gib
    line = f"{worst.name} needs {worst.memory / GIB:.1f} GiB of each {gpu.name}, {usable:.1f} are usable"
    if worst.engine:
        line += (
            f"; {worst.engine / GIB:.1f} are the weights of an engine in each rank: name one of its own with "
            "--rollout_engine URL, or end before post-training with --until"
        )
    return line


def _plan_stage(
    run: RunConfig, name: str, stage: SFTConfig | RLConfig, layout: Layout, gpu: GPU
) -> PostTrainingPlan:
    longest = [share * _longest_answer(run, name) for share in ANSWERS]
    if isinstance(stage, RLConfig):
        answers = stage.prompts * stage.samples
        conversations = stage.steps * answers + screening_answers(stage) + stage.mining.drawn
        length = stage.max_new_tokens
        batch = sum(longest) / 2 * answers / stage.updates_per_rollout
    else:
        epochs = 1.0 if name.endswith(".control") else stage.epochs
        conversations = epochs * _examples(run, name, stage)
        length = stage.sequence_length
        batch = stage.batch_tokens
    if name == "unified":
        conversations += (
            run.posttraining.prompts_per_environment
            * _environments(run)
            * run.posttraining.responses_per_prompt
        )
    batches = replace(run.optimizer, batch_tokens_start=int(batch), batch_tokens_end=int(batch))
    sized = replace(run, optimizer=batches)
    found: Fit = fit(sized, layout, gpu, length)
    time = step_time(sized, layout, gpu, length, found.recompute)
    speeds = [share * time.tokens / time.total for share in EXPECTED]
    engine = 0
    if isinstance(stage, RLConfig) and layout.fsdp > 1 and not run.rollout_engine:
        # Float8 is made of float32 weights, and kept beside them.
        value = compute_bytes(run) if run.rollouts == RolloutPrecision.MODEL else 4 + 1
        engine = value * count_parameters(run.model)["total_with_mtp"]
    memory = found.memory["total"] + engine
    tokens = (conversations * longest[0], conversations * longest[1])
    days = (tokens[0] / speeds[1] / 86400, tokens[1] / speeds[0] / 86400)
    return PostTrainingPlan(
        name=name,
        tokens=tokens,
        sequence_length=length,
        cp=layout.cp,
        memory=memory,
        engine=engine,
        fits=memory <= USABLE * gpu.memory_gib * GIB,
        tokens_per_second_per_gpu=(speeds[0] / layout.world, speeds[1] / layout.world),
        days=days,
        gpu_hours=(days[0] * 24 * layout.world, days[1] * 24 * layout.world),
    )


def _longest_answer(run: RunConfig, name: str) -> int:
    """Return the longest answer of the stage's model, in tokens: the unified model learns those of all experts."""
    own = {
        f"{expert}.{part}": config.rl.max_new_tokens
        for expert, config in run.posttraining.experts()
        for part in ("sft", "rl", "control")
    }
    own["pathology_rl"] = run.posttraining.pathology_rl.max_new_tokens
    return own.get(name, run.posttraining.general_rl.max_new_tokens)


def _examples(run: RunConfig, name: str, stage: SFTConfig) -> int:
    """Count the conversations of a fine-tuning: for each environment of an expert, or in all; a control's, as RL's answers."""
    for expert, config in run.posttraining.experts():
        if name == f"{expert}.sft":
            return stage.samples * len(config.environments)
        if name == f"{expert}.control":
            return config.rl.steps * config.rl.prompts * config.rl.samples
    answers = run.posttraining.prompts_per_environment * _environments(run)
    return min(stage.samples, answers * run.posttraining.responses_per_prompt)


def _environments(run: RunConfig) -> int:
    return sum(len(expert.environments) for _, expert in run.posttraining.experts())
