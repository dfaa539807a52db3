"""Collect the conversations that fine-tuning learns from: oracle's solutions, experts' answers (paper 3.1, 3.4).

    cold start   solutions of the oracle to training tasks, all with their reasoning, some cut after its first step
    unified      right answers of the experts by rejection sampling, half of them without their reasoning,
                 and replies to prompts that provoke pathologies, some of them corrupted

The corrupted replies give the model a bad habit that pathology RL can then cure. A model of this size, trained on clean
text, would have none.
"""

import random
import re
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

from minglm.chat.messages import Message
from minglm.common.files import read_json, write_json
from minglm.data.dialogues import Conversation
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Task, without_reasoning
from minglm.envs.pathology import PathologyPrompts, corrupt
from minglm.recipe.context import RunContext
from minglm.recipe.stages import DISTILLATION_STREAM, ColdStartStage, Teacher, UnifiedStage
from minglm.rl import distill
from minglm.rl.episode import Player, SamplingSettings, Trajectory
from minglm.rl.loop import evenly_spread
from minglm.rl.rollout import rollout

Conversations = dict[str, list[Conversation]]
"""Conversations by environment."""


class Answer(NamedTuple):
    """A conversation that ends with a good answer."""

    environment: str
    messages: list[Message]
    tools: Sequence[dict[str, Any]]


def truncate_reasoning(message: Message) -> Message:
    """Return a message whose reasoning stops after its first step."""
    if "reasoning_content" not in message:
        return message
    first_step = re.split(r"[;\n]", message["reasoning_content"])[0]
    return {**message, "reasoning_content": first_step}


def cold_start_conversations(stage: ColdStartStage) -> Conversations:
    """Return solutions of the oracle to training tasks of each environment, all with thinking."""
    conversations: Conversations = {name: [] for name in stage.environments}
    for name in stage.environments:
        environment = ENVIRONMENTS[name]
        for number, task in enumerate(environment.tasks(stage.config.samples, stage.seed)):
            messages = environment.demonstrate(task)
            if evenly_spread(number, stage.truncated_reasoning_share):
                messages = [truncate_reasoning(message) for message in messages]
            conversations[name].append((messages, task.tools, True))
    return conversations


def unified_conversations(
    context: RunContext, stage: UnifiedStage, answers: Sequence[Answer]
) -> Conversations:
    """Return what the unified model learns: a shuffled choice of the experts' answers, and pathology replies.

    A share of them, `thinking_share`, keeps its reasoning; the others answer directly.
    """
    post = context.run.posttraining
    shuffled = list(answers)
    random.Random(context.run.seed).shuffle(shuffled)
    chosen = shuffled[: stage.config.samples] + pathology_answers(context, stage)
    conversations: Conversations = {}
    for number, answer in enumerate(chosen):
        thinking = evenly_spread(number, post.thinking_share)
        messages = answer.messages
        if not thinking:
            messages = [without_reasoning(message) for message in messages]
        group = conversations.setdefault(answer.environment, [])
        group.append((messages, answer.tools, thinking))
    return conversations


def pathology_answers(context: RunContext, stage: UnifiedStage) -> list[Answer]:
    """Return the oracle's replies to prompts that provoke pathologies, a share of them corrupted."""
    post = context.run.posttraining
    environment = ENVIRONMENTS[PathologyPrompts.name]
    rng = random.Random(context.run.seed)
    answers = []
    for task in environment.tasks(post.pathology_samples, stage.seed):
        messages = environment.demonstrate(task)
        if rng.random() < post.corrupted_share:
            messages = corrupt(task, messages, rng)
        answers.append(Answer(task.environment, messages, ()))
    return answers


class Distillation(NamedTuple):
    """What rejection sampling from the experts gave."""

    answers: list[Answer]
    counts: dict[str, int]
    """Answers, those kept and those that each filter rejected, by "EXPERT: WHAT"."""


def experts_answers(context: RunContext, stage: UnifiedStage) -> Distillation:
    """Sample answers of every expert and keep the right ones; the result is kept on disk, in data/accepted.json."""
    path = context.out / "data" / "accepted.json"
    if path.exists():
        answers, counts = read_json(path)
        return Distillation([Answer(*answer) for answer in answers], counts)
    answers: list[Answer] = []
    counts: dict[str, int] = {}
    for teacher in stage.teachers:
        tasks = [
            task
            for name, count in teacher.prompts.items()
            for task in ENVIRONMENTS[name].tasks(count, stage.seed)
        ]
        accepted, report = distill.accept(_sample(context, teacher, tasks))
        for what, count in report.items():
            counts[f"{teacher.name}: {what}"] = count
        answers += [Answer(t.environment, messages, list(t.tools)) for t, messages in accepted]
        # An environment without one right answer would be missing from the unified model, so the oracle answers for it.
        answered = {task.environment for task, _ in accepted}
        for task in tasks:
            if task.environment not in answered:
                messages = ENVIRONMENTS[task.environment].demonstrate(task)
                answers.append(Answer(task.environment, messages, list(task.tools)))
    if context.world.is_writer:
        write_json(path, [answers, counts])
    return Distillation(answers, counts)


def _sample(context: RunContext, teacher: Teacher, tasks: Sequence[Task]) -> list[Trajectory]:
    """Return an expert's answers to tasks, `responses_per_prompt` to each, sampled as in the evaluation."""
    model = context.load_model(teacher.stage)
    sampler = context.run.evaluation
    settings = SamplingSettings(sampler.max_new_tokens, sampler.temperature, sampler.top_p)
    samples = context.run.posttraining.responses_per_prompt
    with closing(context.rollout_generator(model)) as generator:
        player = Player(generator, context.tokenizer, settings, context.world.ranks)
        groups = rollout(player, ENVIRONMENTS, tasks, samples, seed=DISTILLATION_STREAM)
    return [trajectory for group in groups for trajectory in group]
