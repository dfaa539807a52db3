"""Collect the conversations that fine-tuning learns from: oracle's solutions, experts' answers (paper 3.1).

cold start   solutions of the oracle to training tasks of the difficulties that are shown, all with their reasoning
control      more of them
unified      right answers of the experts by rejection sampling, half of them without their reasoning
"""

import random
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

from minglm.chat.messages import Message
from minglm.common.files import read_json, write_json
from minglm.data.dialogues import Conversation, examples
from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import Environment, Task, without_reasoning
from minglm.recipe.context import RunContext
from minglm.recipe.stages import DISTILLATION_STREAM, Teacher, UnifiedStage
from minglm.report.records import ORACLE
from minglm.rl import distill
from minglm.rl.episode import Player, SamplingSettings, Trajectory
from minglm.rl.rollout import rollout
from minglm.rl.schedule import evenly_spread

HARD_PROMPTS_SEED = 10**6 + DISTILLATION_STREAM  # other random numbers than the first answers had

Conversations = dict[str, list[Conversation]]
"""Conversations by environment."""


class Answer(NamedTuple):
    """A conversation that ends with a good answer."""

    environment: str
    messages: list[Message]
    tools: Sequence[dict[str, Any]]


class Examples(NamedTuple):
    """What fine-tuning trains on, by environment."""

    tokens: dict[str, tuple[np.ndarray, ...]]
    """int64 ids of each example that fits a row; an environment without any is missing."""
    masks: dict[str, tuple[np.ndarray, ...]]
    """bool: where the loss of each is computed."""
    counts: dict[str, int]
    """Examples, those that do not fit included."""
    too_long: dict[str, int]
    """Those that do not fit, where there are any."""

    @property
    def sizes(self) -> dict[str, int]:
        """Return the tokens of the examples that fit."""
        return {environment: sum(map(len, group)) for environment, group in self.tokens.items()}


def fitting(tokenizer: Tokenizer, conversations: Conversations, sequence_length: int) -> Examples:
    """Return the examples of some conversations that fit a row, and count all of them."""
    kept = Examples({}, {}, {}, {})
    for environment, group in conversations.items():
        found = [example for c in group for example in examples(tokenizer, *c)]
        short = [each for each in found if len(each.tokens_S) <= sequence_length]
        kept.counts[environment] = len(found)
        if len(short) < len(found):
            kept.too_long[environment] = len(found) - len(short)
        if short:
            kept.tokens[environment] = tuple(each.tokens_S for each in short)
            kept.masks[environment] = tuple(each.mask_S for each in short)
    return kept


def shown_conversations(
    environments: Iterable[Environment], samples: int, seed: int
) -> Conversations:
    """Return `samples` solutions of the oracle to training tasks of each environment, all with thinking.

    An environment that is named twice brings twice as many.
    """
    conversations: Conversations = {}
    named = list(environments)
    for environment in {each.name: each for each in named}.values():
        count = samples * sum(each.name == environment.name for each in named)
        tasks = environment.shown_tasks(count, seed)
        conversations[environment.name] = [
            (environment.demonstrate(task), task.tools, True) for task in tasks
        ]
    return conversations


def unified_conversations(
    context: RunContext, stage: UnifiedStage, answers: Sequence[Answer]
) -> Conversations:
    """Return what the unified model learns: a shuffled choice of the experts' answers.

    A share of them, `thinking_share`, keeps its reasoning; the others answer directly.
    """
    post = context.run.posttraining
    shuffled = list(answers)
    random.Random(context.run.seed).shuffle(shuffled)
    conversations: Conversations = {}
    for number, answer in enumerate(shuffled[: stage.config.samples]):
        thinking = evenly_spread(number, post.thinking_share)
        messages = answer.messages
        if not thinking:
            messages = [without_reasoning(message) for message in messages]
        group = conversations.setdefault(answer.environment, [])
        group.append((messages, answer.tools, thinking))
    return conversations


class Distillation(NamedTuple):
    """What rejection sampling from the experts gave."""

    answers: list[Answer]
    counts: dict[str, int]
    """Prompts, answers, those that each filter rejected, those kept, those of the oracle, as in `RejectionRecord`."""


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
            for task in context.environments[name].tasks(count, stage.seed)
        ]
        hard, trajectories = _sample(context, teacher, tasks)
        for name in teacher.prompts:
            drawn = [t for t in trajectories if t.task.environment == name]
            accepted, report = distill.accept(drawn, context.environments)
            answers += [Answer(t.environment, messages, list(t.tools)) for t, messages in accepted]

            # Without one right answer the environment would be missing from the unified model, so the oracle answers.
            asked = [task for task in tasks if task.environment == name]
            shown = [] if accepted else asked
            for task in shown:
                messages = context.environments[name].demonstrate(task)
                answers.append(Answer(name, messages, list(task.tools)))
            remaining = sum(task.environment == name for task in hard)
            found = {
                "prompts": len(asked),
                "prompts with short answers, left out": len(asked) - remaining,
                **report,
                ORACLE: len(shown),
            }
            for what, count in found.items():
                counts[f"{teacher.name}, {name}: {what}"] = count
    if context.world.is_writer:
        write_json(path, [answers, counts])
    return Distillation(answers, counts)


class Sampled(NamedTuple):
    """An expert's answers."""

    hard: list[Task]
    """The tasks that were not left out for their short answers."""
    trajectories: list[Trajectory]
    """Answers to them."""


def _sample(context: RunContext, teacher: Teacher, tasks: Sequence[Task]) -> Sampled:
    """Return an expert's answers, `responses_per_prompt` to each hard prompt, sampled as in the evaluation.

    One answer to each prompt tells which are hard; where no prompt is dropped all answers are drawn at once.
    """
    post = context.run.posttraining
    model = context.load_model(teacher.stage)
    sampler = context.run.evaluation
    settings = SamplingSettings(sampler.max_new_tokens, sampler.temperature, sampler.top_p)
    first = 1 if post.drop_shortest else post.responses_per_prompt
    hard = list(tasks)
    with closing(context.rollout_generator(model)) as generator:
        player = Player(generator, context.tokenizer, settings, context.world.ranks)
        groups = rollout(player, context.environments, tasks, first, seed=DISTILLATION_STREAM)
        trajectories = [trajectory for group in groups for trajectory in group]
        if post.drop_shortest:
            remaining = distill.hard_prompts(trajectories, post.drop_shortest)
            hard = [task for task in tasks if task.id in remaining]
            trajectories = [t for t in trajectories if t.task.id in remaining]
            more = post.responses_per_prompt - first
            if more:
                groups = rollout(player, context.environments, hard, more, seed=HARD_PROMPTS_SEED)
                trajectories += [trajectory for group in groups for trajectory in group]
    return Sampled(hard, trajectories)
