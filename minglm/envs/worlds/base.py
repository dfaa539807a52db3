"""Play a task end to end in a world: tools with a state behind them, and a user who wants something (paper 3.4).

    world    schemas of the tools, and a program with a state that answers their calls
    user     speaks in turns with the assistant, and ends the conversation with ###STOP###
    reward   = 1  iff  every call was well-formed, the state is the goal, the assistant kept the policy,
                       and the user was told what came of it

A call goes to the world and its result back to the assistant. Any other message goes to the user, whose
answer is the next user turn. A malformed call ends the episode with 0, as in every environment
(`minglm.envs.base`).

Choices
- The user is a program, or a language model behind the protocol `Generator` (`users`, `model_user`). What a program
  says is decided by the task, so an episode repeats; a model is for evaluation, as in the paper.
- A user who fails (no answer, a broken one, an invented fact) says nothing about the assistant: the sample has the status
  "infrastructure" and leaves the statistics. So has one whose task was completed and told, and whose user talked on until
  the turns were used up. Where the task was not completed by then, the answer is wrong.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, Self

from minglm.chat.messages import Message
from minglm.envs.base import Environment, Episode, Score, Task, user, verdict
from minglm.envs.worlds.users import STOP, User, UserFailed


class World(Protocol):
    """The state behind the tools, and the program that answers their calls."""

    violations: int
    """Calls that the policy forbids."""

    def call(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Run a well-formed call on the state; return its result, plain JSON values."""
        ...


class WorldEnvironment(Environment):
    """Tasks in one world. Subclasses define the world of a task, its user, and what completes it."""

    group = "agentic"
    chance = 0.0
    max_turns = 8
    simulated_user: Callable[[str, str], User] | None = None
    """(what the user knows, its first message) -> the user, as a language model; None: a program plays it."""

    def world(self, task: Task) -> World:
        """Return a world in the task's first state."""
        raise AssertionError("a WorldEnvironment defines world")

    def program_user(self, task: Task) -> User:
        """Return the user of a task as a program."""
        raise AssertionError("a WorldEnvironment defines program_user")

    def knowledge(self, task: Task) -> str:
        """Return in sentences what the user of a task wants and knows: the part of a model that plays the user."""
        raise AssertionError("a WorldEnvironment defines knowledge")

    def completed(self, task: Task, world: Any) -> bool:
        """Return whether the state of the world is the goal, and everything in question was looked up."""
        raise AssertionError("a WorldEnvironment defines completed")

    def told(self, task: Task, reply: str) -> bool:
        """Return whether the assistant's last words to the user say what came of it, and nothing else."""
        raise AssertionError("a WorldEnvironment defines told")

    def with_user(self, simulated_user: Callable[[str, str], User]) -> Self:
        """Return this environment with another user, for example `Simulator.user` of `model_user`."""
        environment = copy.copy(self)
        environment.simulated_user = simulated_user
        return environment

    def user(self, task: Task) -> User:
        """Return the user of one episode."""
        if self.simulated_user is None:
            return self.program_user(task)
        return self.simulated_user(self.knowledge(task), task.messages[-1]["content"])

    def episode(self, task: Task) -> Episode:
        """Return a fresh episode of `task`, with a world and a user of its own."""
        return WorldEpisode(self, task)


class WorldEpisode(Episode):
    """One conversation between the assistant, the world and the user."""

    def __init__(self, environment: WorldEnvironment, task: Task) -> None:
        super().__init__(task, environment.max_turns)
        self.environment = environment
        self.world = environment.world(task)
        self.user = environment.user(task)
        self.reply = ""
        """What the assistant said to the user last."""
        self.stopped = False
        """Whether the user ended the conversation."""

    async def respond(self, message: Message) -> list[Message]:
        """Return the results of a message's calls, or the user's answer to it; nothing when the user ends."""
        calls = message.get("tool_calls") or ()
        if calls:
            results = [self.world.call(call["name"], call["arguments"]) for call in calls]
            return [{"role": "tool", "content": json.dumps(result)} for result in results]
        self.reply = message["content"]
        answer = await self.user.answer(self.reply)
        self.stopped = STOP in answer
        return [] if self.stopped else [user(answer)]

    async def grade(self) -> Score:
        """Return 1 if the task is complete, the user was told, and no call broke the policy."""
        right_state = self.environment.completed(self.task, self.world)
        told = self.environment.told(self.task, self.reply)
        violations = self.world.violations
        complete = right_state and told and not violations
        if complete and self.done and not self.stopped:
            raise UserFailed(f"did not stop within {self.max_turns} turns")
        parts = {"state": float(right_state), "told": float(told), "violations": violations}
        return verdict(complete and self.stopped, parts)


NEGATION = r"(?:not|cannot|never|neither|nor|no longer|unable|\w+n['’]t)"
"""A word that denies an outcome named after it, with two words between them at most: "has not yet been moved"."""
CHAIN = re.compile(r" (?:or|nor)(?: \w+)? ")
"""Between two outcomes that one negation denies."""


class Statement(NamedTuple):
    """An outcome that a reply names."""

    place: int
    """Of its first letter in the reply."""
    done: bool
    """Whether the reply affirms it."""
    word: str
    """In lower case."""


def statements(reply: str, words: Iterable[str]) -> list[Statement]:
    """Return the outcomes that a reply affirms or denies, in their order. words: for the outcomes, in lower case."""
    reply = reply.lower()
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    pattern = rf"\b(?:({NEGATION})(?: \w+){{0,2}}? )?({'|'.join(longest_first)})\b"
    found: list[Statement] = []
    end = 0
    for match in re.finditer(pattern, reply):
        denied = match[1] is not None
        if found and not found[-1].done and CHAIN.fullmatch(reply, end, match.start()):
            denied = True
        found.append(Statement(match.start(2), not denied, match[2]))
        end = match.end()
    return found
