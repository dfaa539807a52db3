"""Record what an outside agent asks and what the model answers as a trajectory: tokens in, tokens out (paper 3.5, 3.3).

    known       segment = prompt, answer, results, answer        the ids of a conversation so far
    next call   its messages = those of the segment + results    prompt = segment's ids + continuation(results)
                anything else                                    prompt = the rendering, and a new segment

An agent speaks in messages: it sends the whole conversation with every call, and may leave out the reasoning,
spell arguments anew, or begin another conversation at any time. The session knows what was sampled for each
message, so the prompt of the next call begins with exactly these ids; what the model said is never tokenized
again.

Choices
- A call continues a segment if its messages are that segment's, told apart by role, text and calls, and only results of
  tools follow. Then the template would keep the reasoning, too. After a user's message it drops it, and a branch, a
  summary or a second agent has another beginning: these are new prompts, hence new segments. All segments share the
  reward, and no sampled token is in two of them.
- Results of several calls stand in the order of the calls, by their ids (`minglm.chat.messages`), however the agent sends them.
- The rules of `play` hold: a malformed turn ends the session with reward 0, whatever the agent says later, and so do a
  turn that was cut off and a disobeyed thinking switch. A session has at most `max_turns` calls.
- An answer is noted when it is complete. A call that fails, or whose client leaves, counts as one and changes nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minglm.chat import continuation
from minglm.chat.messages import Message, Tool
from minglm.envs.base import (
    Score,
    ScoreStatus,
    Task,
    infrastructure_failure,
    message_fault,
    prompt_of,
)
from minglm.inference.request import Completion, Request
from minglm.rl.episode import Player, SeedOfTurn, Segment, Trajectory, take_answer

Key = tuple[Any, ...]
"""What two messages that say the same have in common."""


@dataclass
class Branch:
    """A conversation whose last message was sampled, and its tokens."""

    keys: list[Key]
    """Of its messages."""
    tools: str
    """The tools that it was told of, as JSON."""
    segment: Segment
    length: int
    """Tokens of the segment when this answer had been added; more of them mean that the conversation went on."""


class Session:
    """One task that an outside agent plays. `trajectory` grows with each call."""

    def __init__(
        self, player: Player, task: Task, thinking: bool, seed_of_turn: SeedOfTurn
    ) -> None:
        self.player = player
        self.seed_of_turn = seed_of_turn
        self.trajectory = Trajectory(task, thinking, prompt_of(task, thinking))
        self.branches: list[Branch] = []
        self.calls = 0
        """Answers that were asked for."""
        self.fault: str | None = None
        """Why a turn of the model was malformed, the first one that was."""

    @property
    def closed(self) -> str | None:
        """Return why the model may not be asked again; None if it may."""
        if self.fault is not None:
            return f"a turn of the model was malformed ({self.fault}): the reward is 0"
        if self.calls >= self.player.settings.max_turns:
            return f"the model has been asked {self.calls} times, as often as it may be"
        if self.trajectory.truncated:
            return "the conversation has become too long"
        return None

    def known_prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int] | None:
        """Return the ids of a conversation that goes on with results of tools; None if it must be rendered."""
        keys = [key_of(message) for message in messages]
        offered = _json(list(tools))
        for branch in reversed(self.branches):
            answered = len(branch.keys)
            results = list(messages[answered:])
            continues = branch.keys == keys[:answered] and branch.tools == offered
            is_last = len(branch.segment.tokens) == branch.length
            if continues and is_last and _are_results(results):
                new = continuation(self.player.tokenizer, results, self.trajectory.thinking)
                return branch.segment.tokens + new
        return None

    def ask(self, prompt: list[int], max_new_tokens: int, top_logprobs: int = 0) -> Request:
        """Return the request for the next answer. max_new_tokens: the agent's own bound."""
        settings = self.player.settings
        turn = self.calls
        self.calls += 1
        return Request(
            prompt=prompt,
            max_new_tokens=min(max_new_tokens, settings.max_new_tokens),
            temperature=settings.temperature,
            top_p=settings.top_p,
            thinking_budget=settings.thinking_budget,
            seed=self.seed_of_turn(turn),
            top_logprobs=top_logprobs,
        )

    def note(
        self,
        prompt: list[int],
        completion: Completion,
        messages: Sequence[Message],
        tools: Sequence[Tool],
    ) -> None:
        """Note an answer: its tokens extend the segment that the prompt continues, or begin a new one."""
        trajectory = self.trajectory
        message = take_answer(self.player.tokenizer, trajectory, completion, tools)
        # Another call may have been under way when a turn was malformed.
        self.fault = self.fault or message_fault(message, map(dict, tools))
        segment = self._segment_of(prompt)
        segment.add_answer(completion)
        trajectory.messages = [*messages, message]
        if len(segment.tokens) >= self.player.generator.max_model_len:
            trajectory.truncated = True
        keys = [key_of(one) for one in trajectory.messages]
        self.branches.append(Branch(keys, _json(list(tools)), segment, len(segment.tokens)))

    def _segment_of(self, prompt: list[int]) -> Segment:
        """Return the segment that a prompt continues, with the rest of the prompt as context; a new one if none."""
        for segment in self.trajectory.segments:
            known = len(segment.tokens)
            if prompt[:known] == segment.tokens:
                segment.add_context(prompt[known:])
                return segment
        segment = Segment.prompt(prompt)
        self.trajectory.segments.append(segment)
        return segment

    def end(self, value: float, parts: Mapping[str, float]) -> Trajectory:
        """Return the trajectory with the agent's reward; 0 if a turn of the model was malformed.

        A reward for which the model said nothing says nothing about it: that is a failure of the agent.
        """
        told = dict(parts)
        if not self.branches:
            return self.fail(RuntimeError("the agent gave a reward and never asked the model"))
        if self.fault is not None:
            score = Score(0.0, ScoreStatus.FORMAT, told, self.fault)
        else:
            status = ScoreStatus.OK if value >= 1 else ScoreStatus.WRONG
            score = Score(value, status, told)
        self.trajectory.score = score
        return self.trajectory

    def fail(self, error: Exception) -> Trajectory:
        """Return the trajectory of an agent that failed: it leaves the statistics, what was sampled stays in it."""
        self.trajectory.score = infrastructure_failure(error, self.trajectory.task.environment)
        return self.trajectory


def key_of(message: Mapping[str, Any]) -> Key:
    """Return what a message says: role, text without space around it, and calls; not the reasoning, nor any id."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        calls.append((function["name"], _json(arguments)))
    return (message["role"], _text(message.get("content")).strip(), *calls)


def _text(content: Any) -> str:
    """Return the text of a message's content; parts of text are joined, everything else is JSON."""
    if content is None or isinstance(content, str):
        return content or ""
    if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    return _json(content)


def _are_results(messages: Sequence[Message]) -> bool:
    """Return whether these are results of tools, at least one, and nothing else."""
    return bool(messages) and all(message["role"] == "tool" for message in messages)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
