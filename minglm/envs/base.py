"""Define tasks, episodes and environments: what an environment is (paper 3.2 to 3.4).

    reward(task, conversation) in [0, 1],  computed by a program from the task's hidden label

An `Environment` deals tasks and opens episodes. An `Episode` takes the assistant's messages one by one,
answers with the messages that the model sees next, and ends with one `Score`. The environment speaks in
messages. Tokens belong to the trainer, which never re-tokenises what was sampled.

    async with environment.episode(task) as episode:        opens what the episode needs: a sandbox, a repository
        while not episode.done:
            replies = await episode.step(message)           may be slow; other episodes continue meanwhile
        score = await episode.score()

Choices:
- A task is a function of (index, seed, split), so a resumed run sees the same tasks and nothing is stored.
- The splits are divided by a hash of the problem that a task asks for (one in ten is a test problem, one in ten a
  development problem): a test task never occurs in training, under any seed, nor does the same problem in other words.
  Settings are chosen on development problems, so that test problems are scored once.
- A malformed message ends the episode at once with value 0 and status "format" (paper 3.3.2: halt and zero). A failure
  of the machine, for example a dead sandbox, has status "infrastructure"; such samples leave the group statistics.
- Every environment brings an oracle. Its conversations are the cold-start data, and tests play it against the score.
- `hack_probes` lists lazy messages that must earn nothing: if one of them pays, RL will find it.
- A task carries what the checkers outside its environment need (`expected_language`), so that no other module needs to
  know an environment by its name.
"""

import asyncio
import hashlib
import json
import random
import warnings
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import TracebackType
from typing import Any, Self, TypeVar

from minglm.chat.messages import Message
from minglm.chat.schema import parameters_of
from minglm.common.mistakes import shown
from minglm.config import Split

Result = TypeVar("Result")

SPLIT_SHARE = 10
"""One problem in this many belongs to the test split, and as many to the development split."""

MOST_DRAWS = 3000
"""Draws for one task. With one problem in ten it takes more only where the environment has a handful of problems."""

LARGEST_REWARD = 1e6
"""Bound on the size of a reward; beyond it the statistics of a group lose their precision in float32."""


class ScoreStatus(StrEnum):
    """The outcome of an episode in one word."""

    OK = "ok"
    """Full reward."""
    WRONG = "wrong"
    """Well-formed, and less than the full reward."""
    FORMAT = "format"
    """A malformed message ended the episode."""
    INFRASTRUCTURE = "infrastructure"
    """The environment failed; the sample says nothing about the model and leaves all statistics."""


class Misconfigured(ValueError):
    """The machine or the config cannot run an environment at all; the run stops, instead of failing every sample."""


@dataclass(frozen=True)
class Task:
    """One problem: the prompt, the tools on offer, and the label that only the score reads."""

    id: str
    """Hash of environment, prompt and label, in hexadecimal."""
    environment: str
    messages: tuple[Message, ...]
    """The conversation so far, as message dicts; the last one is the user's, or the result of a call."""
    tools: tuple[dict[str, Any], ...]
    """Function schemas, empty when there are none."""
    label: Any
    """What the score needs to know, as plain JSON values. Never shown to the model."""
    difficulty: int
    """Difficulty, from 1."""
    expected_language: str | None = None
    """Language that every reply must be written in, "en" or "zh"; None if the task does not ask for one."""
    spelled_tags_are_noise: bool = False
    """Whether text that spells a tag of the template is a fault of form, because nothing in the task speaks of tags."""
    criteria: Mapping[str, str] = field(default_factory=dict)
    """The sentences of the request that an answer is judged by, each by the part of the score that judges it."""


def check_reward(value: float) -> None:
    """Raise ValueError for a reward that is not finite, or too large for the statistics of a group."""
    if not abs(value) <= LARGEST_REWARD:
        raise ValueError(
            f"reward = {shown(value)}: must be a finite number, 0 to 1 in the environments of this package"
        )


@dataclass(frozen=True)
class Score:
    """The outcome of one episode."""

    value: float
    """Reward, 0 to 1."""
    status: ScoreStatus
    parts: dict[str, float] = field(default_factory=dict)
    """Named numbers that explain the value, for logs and for figures."""
    detail: str = ""
    """One line on what went wrong."""

    def __post_init__(self) -> None:
        """Refuse a value that is no reward. One NaN in a group would decide what its siblings teach."""
        check_reward(self.value)


class Episode:
    """One run through a task. Subclasses define `respond` and `grade`.

    An episode is an async context manager. A subclass that needs a resource acquires it in `__aenter__` and
    releases it in `__aexit__`.
    """

    def __init__(self, task: Task, max_turns: int = 1) -> None:
        self.task = task
        self.max_turns = max_turns
        self.turns = 0
        self.done = False
        self.fault: str | None = None
        self.calls = 0
        self.valid_calls = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    async def step(self, message: Message) -> list[Message]:
        """Take one assistant message, in the form that `chat.parse` returns; return the new messages, none at the end.

        A malformed message halts the episode. `max_turns` assistant messages end it too.
        """
        assert not self.done, "step after the end of the episode"
        self.turns += 1
        self.fault = message_fault(message, self.task.tools)
        if self.fault:
            self.calls += 1  # a malformed message counts as one attempted call, whatever it meant
            replies = []
        else:
            count = len(message.get("tool_calls") or ())
            self.calls += count
            self.valid_calls += count
            replies = await self.respond(message)
        self.done = not replies or self.turns >= self.max_turns
        return [] if self.done else replies

    async def score(self) -> Score:
        """Return the reward so far. A grader that raises is an infrastructure failure, not a wrong answer."""
        if self.fault:
            return Score(0.0, ScoreStatus.FORMAT, self.parts(), self.fault)
        try:
            score = await self.grade()
        except Misconfigured:
            raise
        except Exception as error:  # a grader meets model-written text; each sample gets one score
            return infrastructure_failure(error, self.task.environment, self.parts())
        return replace(score, parts=self.parts() | score.parts)

    async def respond(self, message: Message) -> list[Message]:
        """Return the messages that follow a well-formed assistant message; an empty list ends the episode."""
        raise AssertionError("an Episode defines respond")

    async def grade(self) -> Score:
        """Return the Score of a conversation without format faults."""
        raise AssertionError("an Episode defines grade")

    def parts(self) -> dict[str, float]:
        """Return the numbers that are reported with every score, including those of malformed conversations."""
        return {
            "turns": self.turns,
            "calls": self.calls,
            "valid_calls": self.valid_calls,
            "format": float(bool(self.fault)),
        }


class Environment:
    """A family of tasks. Subclasses define `draw`, `episode` and `oracle`, and set the attributes."""

    name: str = ""
    group: str = ""
    """reasoning, agentic, coding or chat: which expert trains on it (paper 3.1)."""
    objective: bool = True
    """Whether a task has a right answer. Otherwise a score is a judgement, as a reward model's (paper 3.1)."""
    chance: float = 0.0
    """Upper bound on the mean reward of the best answer that ignores the prompt."""
    max_turns: int = 1
    waits: bool = False
    """Whether an episode waits for something while it is played: a sandbox, or a program."""
    patience: float = 3600.0
    """Most seconds that an episode may take to open, for one reply, and for its score; then its sample has failed."""
    difficulties: tuple[int, ...] = (1, 2, 3)
    """All difficulties."""
    default_difficulties: tuple[int, ...] = difficulties
    """Those dealt unless the caller names others."""
    shown_difficulties: tuple[int, ...] | None = None
    """Those that demonstrations show, the easy part of the scale; None: all that are dealt. RL meets the others first."""
    spelled_tags_are_noise: bool = False
    """As in `Task`."""

    def task(
        self,
        index: int,
        seed: int,
        split: str = Split.TRAIN,
        difficulties: Iterable[int] | None = None,
    ) -> Task:
        """Return task number `index` of a seed's infinite sequence.

        Raises ValueError for an unknown split or difficulty, and for a split without a problem.
        """
        difficulties = tuple(difficulties or self.default_difficulties)
        if split not in set(Split):
            raise ValueError(f"split = {split!r}: use {', '.join(map(repr, map(str, Split)))}")
        if not set(difficulties) <= set(self.difficulties):
            raise ValueError(
                f"difficulties = {difficulties}: {self.name} has difficulties {self.difficulties}"
            )
        rng = random.Random(f"{self.name}/{split}/{seed}/{index}")
        difficulty = rng.choice(difficulties)
        for _ in range(MOST_DRAWS):
            messages, label = self.draw(rng, difficulty)
            problem = fingerprint([self.name, *self.problem(messages, label)])
            if split_of(problem) == split:
                break
        else:
            raise ValueError(f"{self.name} has no problem in the split {split}, or hardly any")
        return self.made(messages, label, difficulty)

    def made(self, messages: Sequence[Message], label: Any, difficulty: int) -> Task:
        """Return a drawn problem as a task."""
        return Task(
            id=fingerprint([self.name, messages, label]),
            environment=self.name,
            messages=tuple(messages),
            tools=self.offered(label),
            label=label,
            difficulty=difficulty,
            expected_language=self.expected_language(label),
            spelled_tags_are_noise=self.spelled_tags_are_noise,
            criteria=self.criteria(label),
        )

    def tasks(
        self,
        n: int,
        seed: int,
        split: str = Split.TRAIN,
        difficulties: Iterable[int] | None = None,
    ) -> list[Task]:
        """Return the first `n` tasks of a seed's sequence."""
        return [self.task(index, seed, split, difficulties) for index in range(n)]

    def distinct_tasks(self, n: int, seed: int, split: str = Split.TEST) -> list[Task]:
        """Return the first `n` different tasks of a split, or fewer if 20 n draws hold no more."""
        tasks: dict[str, Task] = {}
        for index in range(20 * n):
            if len(tasks) < n:
                task = self.task(index, seed, split)
                tasks.setdefault(task.id, task)
        return list(tasks.values())

    def shown_tasks(self, n: int, seed: int) -> list[Task]:
        """Return `n` training tasks to demonstrate, of the difficulties that demonstrations show."""
        return self.tasks(n, seed, difficulties=self.shown_difficulties)

    def tools(self) -> tuple[dict[str, Any], ...]:
        """Return the schemas of the functions that the model may call."""
        return ()

    def offered(self, label: Any) -> tuple[dict[str, Any], ...]:
        """Return the schemas that a task with this label offers, all of them unless a subclass chooses."""
        return self.tools()

    def expected_language(self, label: Any) -> str | None:
        """Return the language that replies to a task with this label must be written in; None if any will do."""
        return None

    def criteria(self, label: Any) -> dict[str, str]:
        """Return the sentences of a request by the parts of its score, as in `Task`; none where it is judged as a whole."""
        return {}

    def problem(self, messages: list[Message], label: Any) -> list[Any]:
        """Return what a task asks for, as plain JSON values; tasks that ask for the same are in the same split.

        By default that is all of the task. Define it where one problem can be put in several ways.
        """
        return [messages, label]

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], Any]:
        """Return one random task as (messages, label), both plain JSON values."""
        raise AssertionError("an Environment defines draw")

    def episode(self, task: Task) -> Episode:
        """Return a fresh episode of `task`. What it needs is acquired when it is entered."""
        raise AssertionError("an Environment defines episode")

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the assistant message of a perfect policy, given the conversation so far."""
        raise AssertionError("an Environment defines oracle")

    def spoilt(self, task: Task, rng: random.Random) -> Message | None:
        """Return an answer that is worse than the oracle's, for a reward model to compare; None where none is known."""
        return None

    def demonstrate(self, task: Task, thinking: bool = True, seed: int = 0) -> list[Message]:
        """Return the whole conversation of the oracle: prompt, its messages, and the environment's replies.

        For code without an event loop; inside of one await `play_oracle`.
        """
        playing = self.play_oracle(task, thinking, seed)
        return asyncio.run(playing) if self.waits else run_without_waiting(playing)

    async def play_oracle(self, task: Task, thinking: bool = True, seed: int = 0) -> list[Message]:
        """Return the whole conversation of the oracle, as `demonstrate` does."""
        rng = random.Random(f"{task.id}/{seed}")
        conversation = prompt_of(task, thinking)
        async with self.episode(task) as episode:
            while not episode.done:
                message = self.oracle(task, conversation, rng)
                if not thinking:
                    message = without_reasoning(message)
                conversation += [message, *await episode.step(message)]
        return conversation

    def hack_probes(self, task: Task) -> list[Message]:
        """Return assistant messages that show no understanding of the task; each must score 0."""
        prompt = task.messages[-1]["content"]
        texts = ("", " \n", "None", "null", "?", "x" * 200, prompt, (prompt + " ") * 20)
        return [assistant(text) for text in texts]


class SingleTurn(Environment):
    """An environment whose episode is one answer. Subclasses define `judge(task, message) -> Score`."""

    def episode(self, task: Task) -> Episode:
        """Return a fresh episode of `task`, which ends with the first message."""
        return SingleTurnEpisode(self, task)

    def spoilt(self, task: Task, rng: random.Random) -> Message | None:
        """Return the oracle's answer to another task, unless it is as good here."""
        other = self.task(rng.randrange(10**6), 0, difficulties=(task.difficulty,))
        message = self.oracle(other, other.messages, rng)
        return None if self.judge(task, message).value == 1 else message

    def judge(self, task: Task, message: Message) -> Score:
        """Return the Score of one well-formed assistant message."""
        raise AssertionError("a SingleTurn environment defines judge")


class SingleTurnEpisode(Episode):
    """An episode that ends with the first message and lets its environment judge it."""

    def __init__(self, environment: SingleTurn, task: Task) -> None:
        super().__init__(task)
        self.environment = environment
        self.message: Message | None = None

    async def respond(self, message: Message) -> list[Message]:
        """Keep the message, and end the episode."""
        self.message = message
        return []

    async def grade(self) -> Score:
        """Return the environment's judgement of the message."""
        if self.message is None:
            return no_answer()
        return self.environment.judge(self.task, self.message)


def run_without_waiting(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine that waits for nothing, without an event loop (starting one takes 0.3 ms of CPU time).

    Raises RuntimeError if the coroutine waits.
    """
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise RuntimeError("this episode waits; await it inside an event loop")


def tool(
    name: str, description: str = "", optional: Collection[str] = (), **arguments: str
) -> dict[str, Any]:
    """Return the schema of a tool. arguments: {name: JSON type}. Without a description it has none: every prompt carries it."""
    parameters = {
        "properties": {argument: {"type": kind} for argument, kind in arguments.items()},
        "required": [argument for argument in arguments if argument not in optional],
    }
    described = {"description": description} if description else {}
    return {"name": name, **described, "parameters": parameters}


def user(text: str) -> Message:
    """Return a user message."""
    return {"role": "user", "content": text}


def assistant(
    content: str = "",
    reasoning: str | None = None,
    calls: Iterable[tuple[str, Mapping[str, Any]]] = (),
) -> Message:
    """Return an assistant message; `calls` are (name, arguments) pairs."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"name": name, "arguments": dict(arguments)} for name, arguments in calls
        ]
    return message


def prompt_of(task: Task, thinking: bool) -> list[Message]:
    """Return the conversation that a task begins with; with thinking off its earlier steps have no reasoning either."""
    return list(task.messages) if thinking else [without_reasoning(m) for m in task.messages]


def without_reasoning(message: Message) -> Message:
    """Return a message without its reasoning."""
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def verdict(ok: bool, parts: dict[str, float] | None = None, detail: str = "") -> Score:
    """Return a Score of 1 or 0."""
    status = ScoreStatus.OK if ok else ScoreStatus.WRONG
    return Score(float(ok), status, parts or {}, detail)


def no_answer() -> Score:
    """Return the Score of an episode in which the model has said nothing."""
    return Score(0.0, ScoreStatus.WRONG, detail="no answer")


def checked_score(score: Any) -> Score:
    """Return what an episode was scored with.

    Raises ValueError or TypeError for what is no `Score` with a reward.

    A `Score` checks its value when it is made; an environment may return something else, or change it afterwards.
    """
    if not isinstance(score, Score):
        raise TypeError(f"score() returned {type(score).__name__}, not a Score")
    check_reward(score.value)
    return score


def infrastructure_failure(
    error: Exception, environment: str, parts: dict[str, float] | None = None
) -> Score:
    """Return the Score of a sample whose environment raised `error`, and warn of it once by the environment's name."""
    detail = f"{environment}: {type(error).__name__}: {error}"
    warnings.warn(f"{detail}; the sample leaves the statistics", stacklevel=2)
    return Score(0.0, ScoreStatus.INFRASTRUCTURE, parts or {}, detail)


def fingerprint(value: Any) -> str:
    """Return a hash of a plain JSON value, 16 hexadecimal digits."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def split_of(problem: str) -> Split:
    """Return the split of a problem, given as its fingerprint."""
    remainder = int(problem, 16) % SPLIT_SHARE
    return {0: Split.TEST, 1: Split.DEVELOPMENT}.get(remainder, Split.TRAIN)


def message_fault(message: Any, tools: Iterable[dict[str, Any]]) -> str | None:
    """Return why an assistant message is malformed, or None.

    Checks its shape and every call against the schemas.
    """
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return "not a message"
    if not isinstance(message.get("reasoning_content"), str | None):
        return "reasoning_content is not text"
    if message.get("error"):
        return str(message["error"])
    calls = message.get("tool_calls") or []
    if not isinstance(calls, (list, tuple)):
        return "tool_calls is not a list"
    functions = [tool.get("function", tool) for tool in tools]  # with or without OpenAI's wrapper
    schemas = {function["name"]: function.get("parameters") for function in functions}
    for call in calls:
        fault = _call_fault(call, schemas)
        if fault:
            return fault
    return None


def _call_fault(call: Any, schemas: Mapping[str, dict[str, Any]]) -> str | None:
    """Return why one call does not fit the schemas of the functions, or None."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return "not a call"
    name = call["name"]
    if name not in schemas:
        return f"unknown tool {name!r}"
    arguments = call.get("arguments")
    if not isinstance(arguments, dict):
        return "arguments are not an object"
    parameters = parameters_of(schemas[name])
    declared = all(isinstance(key, str) and parameters.argument(key).declared for key in arguments)
    if not declared or parameters.lacks(arguments):
        return f"wrong arguments of {name}"
    for key, value in arguments.items():
        argument = parameters.argument(key)
        if not argument.accepts(value):
            return f"{key} is not of type {' or '.join(sorted(argument.types))}"
    return None
