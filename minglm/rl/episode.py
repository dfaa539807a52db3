"""Play one episode: the model answers, the environment replies, until the task is done (paper 3.3, 3.5).

A trajectory keeps the ids that were sampled, with their log-probabilities; training never tokenises text
again. Tool results are appended as ids with mask False: only what the model produced is trained (paper 3.3).
When a user speaks again the template drops earlier reasoning, which rewrites the prompt; such a turn opens a
new segment of the same trajectory, and both segments share its reward.

    async with environment.episode(task) as episode:
        completion = await generator.generate(prompt)       in one batch with all other episodes
        replies = await episode.step(message)               may be slow; the other episodes continue

Choices
- An episode is a coroutine. It waits only for its own turns, so a slow environment delays nobody else.
- A malformed turn ends its episode with reward 0. So does an answer that is cut off, that stops with the wrong role
  token, or that disobeys the thinking switch: the conversation cannot continue from such a turn.
- An exception in the environment is a failure of the infrastructure: this sample alone gets that status, which all
  statistics leave out. So is an environment that says nothing for longer than its `patience`. One that cannot be opened is
  tried once more, because nothing has been sampled yet. An answer that the generator failed at (`AnswerFailed`: numbers that
  are not finite) is such a failure too. Any other exception of the generator, or in our own code, ends the rollout.
"""

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Protocol, TypeVar

from torch import Tensor

from minglm.chat import continuation, render
from minglm.chat.messages import Message, Tool
from minglm.chat.parser import FormatError, Piece
from minglm.chat.stream import decode_turn, turn_pieces
from minglm.common.ranks import Ranks
from minglm.common.trace import Phase, Trace
from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import (
    Environment,
    Episode,
    Misconfigured,
    Score,
    ScoreStatus,
    Task,
    checked_score,
    infrastructure_failure,
    prompt_of,
)
from minglm.inference.client import Generator
from minglm.inference.request import AnswerFailed, Completion, FinishReason, Request
from minglm.rewards.pathology import FAULTS, detect

Result = TypeVar("Result")


class TurnFault(StrEnum):
    """A reason, beside the parser's, why a conversation cannot continue from a turn."""

    TRUNCATED = "truncated"
    """The answer was cut off before its stop token."""
    WRONG_STOP = "wrong_stop"
    """The stop token does not fit: calls end with the observation role, everything else with the user role."""
    THINKING_SWITCH = "thinking_switch"
    """Reasoning although thinking is off, or none although it is on."""


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are sampled, and how long an episode may become."""

    max_new_tokens: int
    """Bound on the tokens of one assistant turn."""
    temperature: float = 1.0
    top_p: float = 1.0
    thinking_budget: int | None = None
    """Bound on the tokens of reasoning in one assistant turn; None: no bound of its own."""
    max_turns: int = 64
    """Bound on the assistant turns of an episode; the environment may have a lower one."""


SeedOfTurn = Callable[[int], int]
"""The number of a turn, from 0 -> the seed of its request."""


class OutsidePlayer(Protocol):
    """Plays tasks with agents that are not part of this package."""

    async def play(
        self, player: "Player", task: Task, thinking: bool, seed_of_turn: SeedOfTurn
    ) -> "Trajectory":
        """Play one task once, as the function `play` does."""
        ...


@dataclass(frozen=True)
class Player:
    """The model's side of an episode: what generates, its tokenizer, and how it samples."""

    generator: Generator
    tokenizer: Tokenizer
    settings: SamplingSettings
    ranks: Ranks = field(default_factory=Ranks)
    """Ranks that divide the episodes, each with a generator of its own for the same weights."""
    outside: OutsidePlayer | None = None
    """Who plays the episodes in place of `play`: agents of other processes."""

    list_tools: bool = True
    """Whether prompts list the tools of the task; False for a model that knows them by heart."""

    trace: Trace | None = None
    """Times the phases of the episodes; None: nobody asks."""

    def span(self, phase: Phase) -> AbstractContextManager[None]:
        """Time a phase of an episode."""
        return contextlib.nullcontext() if self.trace is None else self.trace.span(phase)

    def at(self, temperature: float) -> "Player":
        """Return a player that samples at this temperature."""
        return replace(self, settings=replace(self.settings, temperature=temperature))


@dataclass
class Segment:
    """Token ids, whether the model sampled each, and the log-probability of the sampled ones (0 for the others)."""

    tokens: list[int]
    mask: list[bool]
    logprobs: list[float]
    versions: list[int] = field(default_factory=list)
    """For each token the version of the weights that drew it; -1 where none did, or where nobody counts them."""
    proximal_logprobs: list[float] | None = None
    """Those of the trainer before its first update on this rollout; None until it records them."""
    trainer_logprobs: list[float] | None = None
    """Those of the trainer before its first update; None unless samples are written, or where nobody computed them."""
    experts_SLK: Tensor | None = None
    """The experts that the engine chose for the first tokens, on each MoE layer; None where it does not keep them."""

    @classmethod
    def prompt(cls, tokens: Sequence[int]) -> "Segment":
        """Return a segment that so far holds only a prompt."""
        count = len(tokens)
        return cls(list(tokens), [False] * count, [0.0] * count, [-1] * count)

    def add_answer(self, completion: Completion) -> None:
        """Append an answer.

        A token in it that was put in, not sampled, is context: nothing is learnt from it.

        Its experts are those of the whole text, also of earlier turns.
        """
        self.experts_SLK = completion.experts_SLK
        count = len(completion.tokens)
        first = len(self.tokens)
        self.tokens += completion.tokens
        self.mask += [True] * count
        self.logprobs += completion.logprobs
        self.versions += completion.versions or [-1] * count
        for place in completion.forced:
            self.mask[first + place] = False
            self.logprobs[first + place] = 0.0
            self.versions[first + place] = -1

    def add_context(self, tokens: list[int]) -> None:
        """Append tokens that came from the environment."""
        self.tokens += tokens
        self.mask += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self.versions += [-1] * len(tokens)


@dataclass
class Trajectory:
    """One episode of one sample."""

    task: Task
    thinking: bool
    messages: list[Message] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Each assistant turn as raw text, special tokens spelled out."""
    score: Score = field(default_factory=lambda: Score(0.0, ScoreStatus.WRONG))
    truncated: bool = False
    """Whether a bound on tokens cut the episode off."""
    switch_obeyed: bool = True
    """Whether every turn had reasoning exactly when thinking was on."""
    last_pieces: list[Piece] | None = None
    """The text and the tags of the last assistant turn."""
    advantage: float | None = None
    """What the trainer made of the score; None where nothing was learned from it."""

    @property
    def length(self) -> int:
        """Return the number of tokens that the model produced."""
        return sum(sum(segment.mask) for segment in self.segments)

    @property
    def valid(self) -> bool:
        """Return whether the environment worked; other samples are left out of all statistics."""
        return self.score.status != ScoreStatus.INFRASTRUCTURE

    def last_answer(self) -> tuple[list[Message], Message]:
        """Return the conversation before the model's last message, and that message.

        Replies after it, which a bound on the turns left without an answer, are in neither.
        """
        place = max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        return self.messages[:place], self.messages[place]

    def faults(self) -> dict[str, bool]:
        """Return the pathologies of the last turn, {name: bool}; language only if the task asks for one."""
        return self._faults

    @cached_property
    def _faults(self) -> dict[str, bool]:
        # Reward, statistics and samples all ask, once the episode is over.
        if not self.texts:  # the environment failed before the first turn
            return dict.fromkeys(FAULTS, False)
        # Letters that spell a tag are text, unless the task says that they are noise.
        pieces = None if self.task.spelled_tags_are_noise else self.last_pieces
        return detect(self.texts[-1], self.task.expected_language, pieces=pieces)


async def play(
    player: Player,
    environment: Environment,
    task: Task,
    thinking: bool,
    seed_of_turn: SeedOfTurn,
    opening: Sequence[int] | None = None,
) -> Trajectory:
    """Play one task once.

    Args:
        player: the model's side.
        environment: the task's environment.
        task: the task.
        thinking: the thinking switch of the prompt.
        seed_of_turn: number of a turn, from 0 -> seed of its request.
        opening: `opening_of` this task, for a caller that plays it several times; None: it is rendered here.

    Returns the scored trajectory. An exception in the environment, or an answer that the generator failed at,
    becomes its score's status "infrastructure".
    """
    if player.outside is not None:
        return await player.outside.play(player, task, thinking, seed_of_turn)
    trajectory = Trajectory(task, thinking, prompt_of(task, thinking))
    if opening is None:
        opening = opening_of(player, task, thinking)
    trajectory.segments.append(Segment.prompt(opening))
    try:
        async with _opened(environment, task) as episode:
            await _converse(player, episode, environment.patience, trajectory, seed_of_turn)
            with player.span(Phase.REWARD):
                scored = _score(episode)
                trajectory.score = await _from_environment(scored, environment.patience)
    except EnvironmentFailure as failure:
        trajectory.score = infrastructure_failure(failure.cause, task.environment)
    except AnswerFailed as failure:
        trajectory.score = infrastructure_failure(failure, task.environment)
    return trajectory


class EnvironmentFailure(Exception):
    """An exception in an environment, kept apart from those of the generator and of this module."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


async def _score(episode: Episode) -> Score:
    """Return the score of an episode, which must be one."""
    return checked_score(await episode.score())


async def _from_environment(result: Awaitable[Result], patience: float) -> Result:
    """Await something of an environment, for so many seconds.

    Raises EnvironmentFailure for any exception but Misconfigured, and where it takes longer.
    """
    limit = asyncio.timeout(patience)
    try:
        async with limit:
            return await result
    except Misconfigured:
        raise
    except Exception as error:
        late = TimeoutError(f"nothing within {patience:g} s")
        raise EnvironmentFailure(late if limit.expired() else error) from error


@contextlib.asynccontextmanager
async def _opened(environment: Environment, task: Task) -> AsyncIterator[Episode]:
    """Enter an episode, at the second attempt if need be, and leave it whatever happens.

    A failure to close it is a warning, because it is scored.
    """
    patience = environment.patience
    episode = environment.episode(task)
    try:
        entered = await _from_environment(episode.__aenter__(), patience)
    except EnvironmentFailure:
        episode = environment.episode(task)
        entered = await _from_environment(episode.__aenter__(), patience)
    try:
        yield entered
    finally:
        try:
            await _from_environment(episode.__aexit__(None, None, None), patience)
        except (EnvironmentFailure, Misconfigured) as failure:
            cause = failure.cause if isinstance(failure, EnvironmentFailure) else failure
            name = f"{type(cause).__name__}: {cause}"
            warnings.warn(f"an episode of {task.environment} did not close: {name}", stacklevel=2)


async def _converse(
    player: Player,
    episode: Episode,
    patience: float,
    trajectory: Trajectory,
    seed_of_turn: SeedOfTurn,
) -> None:
    """Take turns until the episode is done, a bound is reached, or the context is full."""
    settings = player.settings
    for turn in range(settings.max_turns):
        request = Request(
            prompt=trajectory.segments[-1].tokens,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            thinking_budget=settings.thinking_budget,
            seed=seed_of_turn(turn),
        )
        with player.span(Phase.GENERATE):
            completion = await player.generator.generate(request)
        await _take_turn(player, episode, patience, trajectory, completion)
        if episode.done:
            return
        # A conversation that fills the model's context cannot continue.
        if len(trajectory.segments[-1].tokens) >= player.generator.max_model_len:
            trajectory.truncated = True
        if trajectory.truncated:
            return


async def _take_turn(
    player: Player,
    episode: Episode,
    patience: float,
    trajectory: Trajectory,
    completion: Completion,
) -> None:
    """Take one sampled turn into the trajectory and, unless the episode is over, prepare the next prompt."""
    trajectory.segments[-1].add_answer(completion)
    message = take_answer(player.tokenizer, trajectory, completion, trajectory.task.tools)
    trajectory.messages.append(message)
    with player.span(Phase.ENVIRONMENT):
        replies = await _from_environment(episode.step(message), patience)
    trajectory.messages += replies
    if episode.done:
        return
    if replies[0]["role"] == "tool":
        # Tool results extend the segment: everything before them stays as it was sampled.
        trajectory.segments[-1].add_context(
            continuation(player.tokenizer, replies, trajectory.thinking)
        )
    else:
        # A user turn makes the template drop earlier reasoning: a new prompt, hence a new segment.
        prompt = _prompt(player, trajectory.messages, trajectory.task, trajectory.thinking)
        trajectory.segments.append(Segment.prompt(prompt))


def take_answer(
    tokenizer: Tokenizer, trajectory: Trajectory, completion: Completion, tools: Sequence[Tool]
) -> Message:
    """Note in a trajectory what an answer says and how it ended; return it as a message, with `error` set if malformed."""
    message, text = read_turn(tokenizer, completion, tools, trajectory.thinking)
    trajectory.texts.append(text)
    trajectory.last_pieces = turn_pieces(tokenizer, completion.tokens)
    if completion.finish_reason != FinishReason.STOP:
        trajectory.truncated = True
    # A thought without an end is read as content; that is a fault of format, and still thinking. So is a thought that
    # was closed by force, however short.
    unclosed = message.get("error") == FormatError.UNCLOSED_THINK
    has_thought = bool(message.get("reasoning_content")) or unclosed or bool(completion.forced)
    if has_thought != trajectory.thinking:
        trajectory.switch_obeyed = False
    return message


def opening_of(player: Player, task: Task, thinking: bool) -> list[int]:
    """Return the prompt of a task's first turn, which is the same for all of its samples."""
    return _prompt(player, prompt_of(task, thinking), task, thinking)


def _prompt(player: Player, messages: Sequence[Message], task: Task, thinking: bool) -> list[int]:
    """Return the rendered conversation so far, up to the assistant's role token."""
    return render(
        player.tokenizer,
        messages,
        task.tools if player.list_tools else (),
        thinking,
        generation_prompt=True,
    ).ids


def read_turn(
    tokenizer: Tokenizer, completion: Completion, tools: Sequence[Tool], thinking: bool
) -> tuple[Message, str]:
    """Return one sampled turn as a message, with `error` set where it is malformed, and its raw text."""
    text = tokenizer.decode(completion.tokens)
    message = decode_turn(tokenizer, completion.tokens, tools)
    expected = tokenizer.special["<|observation|>" if message["tool_calls"] else "<|user|>"]
    if completion.finish_reason != FinishReason.STOP:
        fault = TurnFault.TRUNCATED
    elif completion.tokens[-1] != expected:
        fault = TurnFault.WRONG_STOP
    elif bool(message["reasoning_content"] or completion.forced) != thinking:
        fault = TurnFault.THINKING_SWITCH
    else:
        fault = None
    return {**message, "error": message["error"] or fault}, text
