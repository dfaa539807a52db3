"""Episodes: the model answers, the environment replies, until the task is done (paper 3.3, 3.5).

A trajectory keeps the very ids that were sampled, with their log-probabilities; training never tokenises text again.
Tool results are appended as ids of their own, with mask False: only what the model produced is trained (paper 3.3).
When a user speaks again the template drops earlier reasoning, which rewrites the prompt; such a turn opens a new
segment of the same trajectory, and both segments share its reward.

All episodes of a step advance together, turn by turn, so that the engine always has a full batch. A malformed turn
ends its episode with reward 0. So does an answer that is cut off, that stops with the wrong role token, or that
disobeys the thinking switch: nobody could go on from there.
"""

from dataclasses import dataclass, field

from minglm.chat import continuation, parse, render
from minglm.envs.base import Score, Task
from minglm.inference.engine import Request


@dataclass
class Segment:
    """Token ids, whether the model sampled each, and the log-probability of those it did (0 elsewhere)."""

    tokens: list[int]
    mask: list[bool]
    logprobs: list[float]

    @classmethod
    def prompt(cls, tokens):
        """A segment that so far holds only a prompt."""
        return cls(list(tokens), [False] * len(tokens), [0.0] * len(tokens))

    def add(self, tokens, logprobs=None):
        """Append sampled tokens, or, without log-probabilities, tokens that came from outside."""
        self.tokens += tokens
        self.mask += [logprobs is not None] * len(tokens)
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs


@dataclass
class Trajectory:
    """One episode of one sample."""

    task: Task
    thinking: bool
    messages: list = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Each assistant turn as raw text, special tokens spelled out."""
    score: Score | None = None
    truncated: bool = False
    switch_obeyed: bool = True

    @property
    def length(self):
        """Tokens the model produced."""
        return sum(sum(segment.mask) for segment in self.segments)


def read_turn(tokenizer, completion, tools, thinking):
    """One sampled turn as a message, with `error` set where it is malformed; also its raw text."""
    text = tokenizer.decode(completion.tokens)
    message = parse(text, tools)
    thought = bool(message.get("reasoning_content"))
    expected = tokenizer.special["<|observation|>" if message["tool_calls"] else "<|user|>"]
    if completion.finish_reason != "stop":
        fault = "truncated"
    elif completion.tokens[-1] != expected:
        fault = "wrong_stop"
    elif thought != thinking:
        fault = "thinking_switch"
    else:
        fault = None
    message["error"] = message["error"] or fault
    return message, text


def rollout(
    engine, tokenizer, environments, tasks, samples, settings, thinking=None, seed=0, first_sample=0
):
    """Play every task `samples` times.

    environments: {name: Environment}. settings: an object with max_new_tokens, temperature and, optionally, top_p
    and max_turns. thinking: one bool per task (None: all True). seed decides every draw, together with the task's and
    the sample's number. Returns a list, per task, of lists of `Trajectory`.
    """
    thinking = [True] * len(tasks) if thinking is None else thinking
    groups = [
        [Trajectory(task, think, list(task.messages)) for _ in range(samples)]
        for task, think in zip(tasks, thinking, strict=True)
    ]
    episodes, active = {}, []
    for p, group in enumerate(groups):
        prompt = render(
            tokenizer, tasks[p].messages, tasks[p].tools, thinking[p], generation_prompt=True
        ).ids
        for g, trajectory in enumerate(group):
            trajectory.segments.append(Segment.prompt(prompt))
            episodes[p, g] = environments[tasks[p].environment].episode(tasks[p])
            active.append((p, g))
    turn, most = 0, getattr(settings, "max_turns", None) or 64
    while active and turn < most:
        requests = [
            Request(
                groups[p][g].segments[-1].tokens,
                settings.max_new_tokens,
                settings.temperature,
                getattr(settings, "top_p", 1.0),
                seed=(((seed * 1_000_003 + p) * 1_000_003 + g + first_sample) * 101 + turn) % 2**62,
            )
            for p, g in active
        ]
        completions = engine.generate(requests)
        for (p, g), completion in zip(active, completions, strict=True):
            _advance(tokenizer, groups[p][g], episodes[p, g], completion)
            if not episodes[p, g].done:  # a conversation that has outgrown the model cannot go on
                groups[p][g].truncated |= len(groups[p][g].segments[-1].tokens) >= engine.limit
        active = [(p, g) for p, g in active if not (episodes[p, g].done or groups[p][g].truncated)]
        turn += 1
    for (
        environment
    ) in environments.values():  # grouped, because some environments grade in parallel
        keys = [key for key in episodes if tasks[key[0]].environment == environment.name]
        for (p, g), score in zip(
            keys, environment.score_all([episodes[key] for key in keys]), strict=True
        ):
            groups[p][g].score = score
    return groups


def _advance(tokenizer, trajectory, episode, completion):
    """Take one sampled turn into the trajectory and, unless the episode is over, prepare the next prompt."""
    task = trajectory.task
    message, text = read_turn(tokenizer, completion, task.tools, trajectory.thinking)
    trajectory.segments[-1].add(completion.tokens, completion.logprobs)
    trajectory.texts.append(text)
    trajectory.truncated |= completion.finish_reason != "stop"
    trajectory.switch_obeyed &= bool(message.get("reasoning_content")) == trajectory.thinking
    replies = episode.step(message)
    trajectory.messages += [message, *replies]
    if episode.done:
        return
    if replies[0]["role"] == "tool":
        trajectory.segments[-1].add(continuation(tokenizer, replies, trajectory.thinking))
    else:
        prompt = render(
            tokenizer, trajectory.messages, task.tools, trajectory.thinking, generation_prompt=True
        )
        trajectory.segments.append(Segment.prompt(prompt.ids))
