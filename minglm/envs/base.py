"""Tasks with verifiable rewards: what an environment is (paper 3.2 to 3.4).

    reward(task, conversation) in [0, 1],  computed by a program from the task's hidden label

An `Environment` deals tasks and starts episodes; an `Episode` takes the assistant's messages one by one, answers with
the messages the model sees next, and ends with one `Score`. The environment speaks in messages. Tokens belong to the
trainer, which never re-tokenises what was sampled.

Choices:
- A task is a function of (index, seed, split), so a run that resumes sees the same tasks and nothing is stored.
- Train and test are divided by a hash of the task's content (one in ten is a test task): a test task never occurs in
  training, under any seed.
- A malformed message ends the episode at once with value 0 and status "format" (paper 3.3.2: halt and zero). A failure
  of the machine, a dead sandbox for instance, has status "infrastructure", and such samples leave the group statistics.
- Every environment brings an oracle. Its conversations are the cold-start data, and tests play it against the score.
- `hack_probes` lists lazy messages that must earn nothing: if one pays, reinforcement will find it.

Simplification: calls are synchronous; a slow environment is run in threads by the caller.
"""

import hashlib
import json
import random
from dataclasses import dataclass, field, replace

TEST_SHARE = 10
"""One task in this many belongs to the test split."""


@dataclass(frozen=True)
class Task:
    """One problem: the prompt, the tools on offer, and the label that only the score reads."""

    id: str
    """Hash of environment, prompt and label, in hexadecimal."""
    environment: str
    messages: tuple
    """The conversation so far, as message dicts; the last one is the user's."""
    tools: tuple
    """Function schemas, empty when there are none."""
    label: object
    """What the score needs to know, as plain JSON values. Never shown to the model."""
    tier: int
    """Difficulty, from 1."""


@dataclass(frozen=True)
class Score:
    """The outcome of one episode."""

    value: float
    """Reward, 0 to 1."""
    status: str
    """"ok" (full reward), "wrong", "format" (malformed message), or "infrastructure" (not the model's fault)."""
    parts: dict = field(default_factory=dict)
    """Named numbers that explain the value, for logs and for figures."""
    detail: str = ""
    """One line on what went wrong."""


class Episode:
    """One run through a task. Subclasses define `respond` and `grade`."""

    def __init__(self, task, max_turns=1):
        self.task = task
        self.max_turns = max_turns
        self.turns = 0
        self.done = False
        self.fault = None
        self.calls = 0
        self.valid_calls = 0

    def step(self, message):
        """Take one assistant message (the shape `chat.parse` returns); give the new messages, none at the end.

        A malformed message halts the episode. `max_turns` assistant messages end it too.
        """
        assert not self.done, "step after the end of the episode"
        self.turns += 1
        self.fault = message_fault(message, self.task.tools)
        if self.fault:
            self.calls += 1  # what came of a malformed message is one attempt, however it was meant
        else:
            count = len(message.get("tool_calls") or ())
            self.calls, self.valid_calls = self.calls + count, self.valid_calls + count
        replies = [] if self.fault else self.respond(message)
        self.done = not replies or self.turns >= self.max_turns
        return [] if self.done else replies

    def score(self):
        """The reward so far. A grader that fails is an infrastructure failure, not a wrong answer."""
        if self.fault:
            return Score(0.0, "format", self.parts(), self.fault)
        try:
            score = self.grade()
            return replace(score, parts=self.parts() | score.parts)
        except (
            Exception
        ) as error:  # one reward per sample, whatever a grader meets in model-written text
            return Score(0.0, "infrastructure", self.parts(), f"{type(error).__name__}: {error}")

    def respond(self, message):
        """The messages that follow a well-formed assistant message; an empty list ends the episode."""
        raise AssertionError("an Episode defines respond")

    def grade(self):
        """The Score of a conversation without format faults."""
        raise AssertionError("an Episode defines grade")

    def parts(self):
        """Numbers that are reported with every score, faulty ones included."""
        format_fault = float(bool(self.fault))
        return {
            "turns": self.turns,
            "calls": self.calls,
            "valid_calls": self.valid_calls,
            "format": format_fault,
        }


class Environment:
    """A family of tasks. Subclasses define `draw`, `episode` and `oracle`, and set the attributes."""

    name = ""
    group = ""
    """reasoning, agentic, coding or chat: which expert trains on it (paper 3.1)."""
    chance = 0.0
    """Upper bound on the mean reward of the best answer that ignores the prompt."""
    max_turns = 1
    tiers = (1, 2, 3)
    """All difficulties."""
    default_tiers = tiers
    """Those dealt unless the caller names others."""

    def task(self, index, seed, split="train", tiers=None):
        """Task number `index` of a seed's infinite sequence; raises ValueError for an unknown split or tier."""
        tiers = tuple(tiers or self.default_tiers)
        if split not in ("train", "test"):
            raise ValueError(f"split = {split!r}: use 'train' or 'test'")
        if not set(tiers) <= set(self.tiers):
            raise ValueError(f"tiers = {tiers}: {self.name} has tiers {self.tiers}")
        rng = random.Random(f"{self.name}/{split}/{seed}/{index}")
        tier = rng.choice(tiers)
        while True:
            messages, label = self.draw(rng, tier)
            identity = fingerprint([self.name, messages, label])
            if (int(identity, 16) % TEST_SHARE == 0) == (split == "test"):
                return Task(identity, self.name, tuple(messages), self.tools(), label, tier)

    def tasks(self, n, seed, split="train", tiers=None):
        """The first `n` tasks of a seed's sequence."""
        return [self.task(index, seed, split, tiers) for index in range(n)]

    def test_tasks(self, n, seed):
        """The first `n` different tasks of the test split; fewer where 20 n draws hold no more."""
        found = {}
        for index in range(20 * n):
            if len(found) < n:
                task = self.task(index, seed, "test")
                found.setdefault(task.id, task)
        return list(found.values())

    def tools(self):
        """Schemas of the functions the model may call."""
        return ()

    def draw(self, rng, tier):
        """One random task as (messages, label), both plain JSON values."""
        raise AssertionError("an Environment defines draw")

    def episode(self, task):
        """A fresh episode of `task`."""
        raise AssertionError("an Environment defines episode")

    def oracle(self, task, conversation, rng):
        """The assistant message of a perfect policy, given the conversation so far."""
        raise AssertionError("an Environment defines oracle")

    def score_all(self, episodes):
        """One Score per episode; environments that grade in parallel override it."""
        return [episode.score() for episode in episodes]

    def demonstrate(self, task, thinking=True, seed=0):
        """The whole conversation of the oracle: prompt, its messages, and the environment's replies."""
        rng = random.Random(f"{task.id}/{seed}")
        episode, conversation = self.episode(task), list(task.messages)
        while not episode.done:
            message = self.oracle(task, conversation, rng)
            if not thinking:
                message.pop("reasoning_content", None)
            conversation += [message, *episode.step(message)]
        return conversation

    def hack_probes(self, task):
        """Assistant messages without any understanding of the task; each must score 0."""
        prompt = task.messages[-1]["content"]
        return [
            assistant(text)
            for text in ("", " \n", "None", "null", "?", "x" * 200, prompt, (prompt + " ") * 20)
        ]


class SingleTurn(Environment):
    """An environment whose episode is one answer. Subclasses define `judge(task, message) -> Score`."""

    def episode(self, task):
        return SingleTurnEpisode(self, task)

    def judge(self, task, message):
        """The Score of one well-formed assistant message."""
        raise AssertionError("a SingleTurn environment defines judge")


class SingleTurnEpisode(Episode):
    """Ends with the first message and lets the environment judge it."""

    def __init__(self, environment, task):
        super().__init__(task)
        self.environment = environment
        self.message = None

    def respond(self, message):
        self.message = message
        return []

    def grade(self):
        if self.message is None:
            return Score(0.0, "wrong", detail="no answer")
        return self.environment.judge(self.task, self.message)


def user(text):
    """A user message."""
    return {"role": "user", "content": text}


def assistant(content="", reasoning=None, calls=()):
    """An assistant message; `calls` are (name, arguments) pairs."""
    message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"name": name, "arguments": dict(arguments)} for name, arguments in calls
        ]
    return message


def verdict(ok, parts=None, detail=""):
    """A Score of 1 or 0."""
    return Score(float(ok), "ok" if ok else "wrong", parts or {}, detail)


def fingerprint(value):
    """Hash of a plain JSON value, 16 hexadecimal digits."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


JSON_TYPES = {
    "integer": int,
    "string": str,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


def message_fault(message, tools):
    """Why an assistant message is malformed, or None. Checks its shape and every call against the schemas."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return "not a message"
    if not isinstance(message.get("reasoning_content"), str | None):
        return "reasoning_content is not text"
    if message.get("error"):
        return str(message["error"])
    calls = message.get("tool_calls") or []
    if not isinstance(calls, (list, tuple)):
        return "tool_calls is not a list"
    functions = [
        tool.get("function", tool) for tool in tools
    ]  # with or without OpenAI's outer layer
    schemas = {function["name"]: function.get("parameters", {}) for function in functions}
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return "not a call"
        if call["name"] not in schemas:
            return f"unknown tool {call['name']!r}"
        arguments, schema = call.get("arguments"), schemas[call["name"]]
        if not isinstance(arguments, dict):
            return "arguments are not an object"
        properties = schema.get("properties", {})
        if not set(schema.get("required", ())) <= set(arguments) or not set(arguments) <= set(
            properties
        ):
            return f"wrong arguments of {call['name']}"
        for key, value in arguments.items():
            kind = properties[key].get("type", "string")
            if not isinstance(value, JSON_TYPES.get(kind, object)) or (
                isinstance(value, bool) and kind != "boolean"
            ):
                return f"{key} is not of type {kind}"
    return None
