"""Keep every sample of reinforcement learning as a line of JSON, and read it back to the last bit (paper 3.5).

    RUN/samples/STAGE.jsonl      {"head": {"stage": ..., "prompts": ..., ...}}
                                 {"step": 0, "groups": 4, "refill": 0, "place": 3, "sample": 1, "messages": [...], "segments": [...], ...}

A line holds all that training needs of a trajectory but its task, which the schedule deals again: the file of
a stage is what `run --from-rollouts` trains on. Lines of one step stand together, and the steps in order, so
that a resumed run cuts the file back to its checkpoint. Each names the number of groups of its step, so that a
file that lost its end is noticed.

    segments[i]: tokens      ids, prompt and tool results included
                 logprobs    of the engine, nats; null where the model did not sample the token
                 trained     of the trainer before its first update, nats, for each sampled token; missing where not trained
                 versions    of the weights that drew each sampled token, [[version, how many tokens in a row], ...]

Choices: a log-probability is float32, and is written with the fewest digits that give the same float32 again.
A text that an agent framework may read, the messages, stands beside the ids, from which nothing is tokenised
again.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minglm.chat.parser import Piece, Tag
from minglm.common.files import json_line
from minglm.envs.base import Score, ScoreStatus, Task
from minglm.rl.episode import Segment, Trajectory

Line = dict[str, Any]

FIELDS = frozenset(
    {"step", "groups", "refill", "place", "task", "thinking", "messages", "segments"}
)
"""A line without these is no sample."""


class GroupKey(NamedTuple):
    """The place of a group in a stage."""

    step: int
    """From 0."""
    refill: int
    """0 for the first tasks of a step, then the number of the round of new ones."""
    place: int
    """Among the prompts of the step."""


def shortest(values: Sequence[float]) -> list[float]:
    """Return float32 numbers as the shortest decimals that give the same float32 again."""
    return [float(text) for text in np.asarray(values, dtype=np.float32).astype(str)]


def write_segment(segment: Segment) -> Line:
    """Return a segment as plain JSON values."""
    numbers = shortest(segment.logprobs)
    logprobs = [p if m else None for p, m in zip(numbers, segment.mask, strict=True)]
    sampled = [v for v, m in zip(segment.versions, segment.mask, strict=False) if m]
    line = {
        "tokens": segment.tokens,
        "logprobs": logprobs,
        "versions": [[version, len(list(run))] for version, run in groupby(sampled)],
    }
    if segment.trainer_logprobs is not None:
        trained = [p for p, m in zip(segment.trainer_logprobs, segment.mask, strict=True) if m]
        line["trained"] = shortest(trained)
    if segment.experts_SLK is not None:
        line["experts"] = write_tensor(segment.experts_SLK)
    return line


def read_segment(line: Line) -> Segment:
    """Return the segment that `write_segment` wrote."""
    mask = [logprob is not None for logprob in line["logprobs"]]
    logprobs = [0.0 if logprob is None else logprob for logprob in line["logprobs"]]
    drawn = iter([version for version, count in line["versions"] for _ in range(count)])
    versions = [next(drawn, -1) if sampled else -1 for sampled in mask]
    segment = Segment(line["tokens"], mask, logprobs, versions)
    if "experts" in line:
        segment.experts_SLK = read_tensor(line["experts"])
    return segment


def write_tensor(tensor: Tensor) -> list[Any]:
    """Return a tensor of integers as [dtype, shape, bytes in base64]."""
    array = tensor.cpu().numpy()
    return [str(array.dtype), list(array.shape), base64.b64encode(array.tobytes()).decode()]


def read_tensor(values: Sequence[Any]) -> Tensor:
    """Return the tensor that `write_tensor` wrote."""
    dtype, shape, text = values
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype).reshape(shape).copy())


def write_sample(key: GroupKey, sample: int, trajectory: Trajectory) -> Line:
    """Return a trajectory as plain JSON values."""
    t = trajectory
    pieces = t.last_pieces
    return {
        **key._asdict(),
        "sample": sample,
        "task": t.task.id,
        "environment": t.task.environment,
        "difficulty": t.task.difficulty,
        "thinking": t.thinking,
        "reward": t.score.value,
        "advantage": t.advantage,
        "status": str(t.score.status),
        "parts": t.score.parts,
        "detail": t.score.detail,
        "truncated": t.truncated,
        "switch_obeyed": t.switch_obeyed,
        "messages": t.messages,
        "texts": t.texts,
        "pieces": None if pieces is None else [p if isinstance(p, str) else [*p] for p in pieces],
        "segments": [write_segment(segment) for segment in t.segments],
    }


def read_sample(line: Line, task: Task) -> Trajectory:
    """Return the trajectory that `write_sample` wrote, of a task that is dealt again.

    Raises ValueError for another.
    """
    if line["task"] != task.id:
        raise ValueError(
            f"step {line['step']}, place {line['place']} is task {line['task']}, where this config deals {task.id}"
        )
    pieces: list[Piece] | None = None
    if line["pieces"] is not None:
        pieces = [p if isinstance(p, str) else Tag(*p) for p in line["pieces"]]
    return Trajectory(
        task,
        line["thinking"],
        line["messages"],
        [read_segment(segment) for segment in line["segments"]],
        line["texts"],
        Score(line["reward"], ScoreStatus(line["status"]), line["parts"], line["detail"]),
        line["truncated"],
        line["switch_obeyed"],
        pieces,
    )


class SampleFile:
    """The samples of one stage on disk, step after step.

    path: of the file, which is made with the first sample. head: {name: plain value} of what the samples
    depend on; who reads them compares it.
    """

    def __init__(self, path: Path, head: Line) -> None:
        self.path = path
        self.head = head

    def cut(self, step: int) -> None:
        """Remove the samples of a step and of those after it, which will be drawn again."""
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            position = 0
            for line in file:
                if not line.endswith(b"\n") or first_number(line, "step", step) >= step:
                    break
                position += len(line)
            file.truncate(position)

    def write(self, keys: Sequence[GroupKey], groups: Sequence[Sequence[Trajectory]]) -> None:
        """Append the groups of a step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines: list[Line] = []
        for key, group in zip(keys, groups, strict=True):
            for g, trajectory in enumerate(group):
                lines.append({"groups": len(groups), **write_sample(key, g, trajectory)})
        with open(self.path, "ab") as file:
            if not file.tell():
                file.write(json_line({"head": self.head}))
            for line in lines:
                file.write(json_line(line))


def first_number(line: bytes, name: str, otherwise: int) -> int:
    """Return a number of a line of JSON; the head has none, and is before every step."""
    try:
        values = json.loads(line)
    except ValueError:
        return otherwise
    return values.get(name, -1)


def read_steps(path: Path, head: Mapping[str, Any]) -> Iterator[list[Line]]:
    """Yield the samples of each step of a file, in order.

    Raises ValueError, in one line, for a file that is none, or whose head differs from what this config asks for.
    """
    lines = read_lines(path)
    found = next(lines)["head"]
    for name, value in head.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path} is of another config: {name} is {found.get(name)!r}, and {value!r} is asked for"
            )
    for _, step in groupby(lines, key=lambda line: line["step"]):
        yield list(step)


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the line with the head, then the samples.

    Raises ValueError that names the file and the line that is neither.
    """
    number = 0
    is_whole = False
    try:
        with open(path, "rb") as file:
            for number, text in enumerate(file, 1):
                line = json.loads(text)
                names = FIELDS if number > 1 else {"head"}
                is_whole = line.keys() >= names and isinstance(line.get("head", {}), dict)
                if not is_whole:
                    break
                yield line
    except (OSError, ValueError, RecursionError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"{path}, line {number or 1} holds no rollouts; "
            "give a file that `run --rollout-only` or a run wrote, samples/STAGE.jsonl"
        )
