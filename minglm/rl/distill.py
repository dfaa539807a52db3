"""Turn good answers into training data: rejection sampling, prompt selection, self-distillation (paper 3.1, 3.3).

The experts answer each prompt several times. The unified model learns from the answers that pass four filters:

    form      not repetitive, not too short, not truncated, well-formed reasoning and calls
    correct   right, where an objective answer exists
    reward    liked by the reward model, where none exists
    protocol  tools used as agreed, and the expected end state reached

`reject` also closes the loop of the agentic section: train by RL until a plateau, replace the cold-start data
by the policy's own accepted answers, fine-tune a fresh model on them, and continue with harder tasks.

Prompts are selected by the length of their answers: short answers mark easy prompts, and dropping the shorter
half raised the paper's mathematics and science scores by 2 to 4% with half of the data. The prompts that
remain are the hard ones, and four answers to each raised them by 1 to 2% more.

Choices: the length of a prompt's answers is known after one answer each, so the others are drawn for the hard
prompts alone. Lengths are compared within an environment, or one with short conversations would be dropped
whole. Where an environment has no right answers (`Environment.objective`) its score is the judgement that a
reward model would give. A filter is a predicate of one sample, so filters commute, and what is kept passes
all of them when asked again. The report counts every filter on every sample; a sample with two faults counts
twice, whatever the order. Simplified: `data.cleaning.minhash` removes duplicates. The paper gives no
thresholds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from minglm.chat.messages import Message
from minglm.chat.parser import Piece
from minglm.envs.base import Environment, ScoreStatus, Task
from minglm.rewards.pathology import detect
from minglm.rl.episode import Trajectory

LEAST_JUDGEMENT = 0.5
"""Judgement that an answer needs where no objective answer exists."""


@dataclass(frozen=True)
class Sample:
    """One answer of a teacher."""

    prompt: str
    """Id of the prompt; several answers share it."""
    text: str
    """The final assistant turn, raw, with special tokens spelled out."""
    earlier: tuple[str, ...] = ()
    """The assistant turns before it, raw."""
    messages: tuple[Message, ...] = ()
    """The whole conversation."""
    score: float | None = None
    """The environment's score, 0 to 1; None where no objective answer exists."""
    judgement: float | None = None
    """What is thought of the answer, 0 to 1, where no objective answer exists; otherwise None."""
    status: str = ScoreStatus.OK
    """Status of the score."""
    truncated: bool = False
    """Whether the bound on new tokens cut it off."""
    n_tokens: int = 0
    """Tokens that the teacher produced."""
    pieces: Sequence[Piece] | None = None
    """The pieces of `text`, where they are known; None: tags are read from its letters."""


Filter = Callable[[Sample], bool]
"""Whether to keep a sample."""


class RejectionReport(NamedTuple):
    """How many samples each filter rejected."""

    samples: int
    kept: int
    rejected: dict[str, int]
    """By name of the filter; a sample that fails two filters counts twice."""


class Rejection(NamedTuple):
    """The outcome of rejection sampling."""

    kept: list[Sample]
    report: RejectionReport


class Accepted(NamedTuple):
    """The accepted answers of a rollout."""

    conversations: list[tuple[Task, list[Message]]]
    """Each different accepted answer once."""
    counts: dict[str, int]
    """answers, those that each filter rejected, kept, and how many of these are different."""


def well_formed(min_tokens: int = 1, language: str | None = None) -> Filter:
    """Return filter one: long enough, not cut off, and none of the faults of `pathology.detect`."""

    def keep(sample: Sample) -> bool:
        if sample.truncated or sample.n_tokens < min_tokens:
            return False
        return not any(detect(sample.text, language, pieces=sample.pieces).values())

    return keep


def correct(least: float = 1.0) -> Filter:
    """Return filter two: the objective score, where there is one, reaches `least`."""
    return lambda sample: sample.score is None or sample.score >= least


def rewarded(reward: Callable[[Sample], float], least: float) -> Filter:
    """Return filter three: where no objective score exists, `reward(sample)` reaches `least`."""
    return lambda sample: sample.score is not None or reward(sample) >= least


def reached_by_score(sample: Sample) -> bool:
    """Return whether the environment says that the expected end state was reached."""
    return sample.status == ScoreStatus.OK


def obeys_protocol(reached: Filter = reached_by_score) -> Filter:
    """Return filter four: no malformed turn and, with tool calls, each call answered in place and the end reached.

    reached: whether the expected end state was reached. A call in the last message needs no answer: it may be
    the act that ends the episode.
    """

    def keep(sample: Sample) -> bool:
        if sample.status in (ScoreStatus.FORMAT, ScoreStatus.INFRASTRUCTURE):
            return False
        open_calls = 0
        used_tools = False
        for message in sample.messages:
            if message["role"] == "tool":
                open_calls -= 1
            elif open_calls:
                return False  # somebody speaks before every call is answered
            else:
                open_calls = len(message.get("tool_calls") or ())
            if open_calls < 0:
                return False  # a result without a call
            used_tools |= open_calls > 0
        return not used_tools or bool(reached(sample))

    return keep


def reject(samples: Iterable[Sample], filters: Mapping[str, Filter]) -> Rejection:
    """Keep the samples that pass every filter, in the given order. filters: {name: filter}."""
    kept = []
    rejected = dict.fromkeys(filters, 0)
    total = 0
    for sample in samples:
        total += 1
        failed = [name for name, keep in filters.items() if not keep(sample)]
        for name in failed:
            rejected[name] += 1
        if not failed:
            kept.append(sample)
    return Rejection(kept, RejectionReport(total, len(kept), rejected))


def judgement(sample: Sample) -> float:
    """Return what the environment thought of an answer that nothing objective decides."""
    return 0.0 if sample.judgement is None else sample.judgement


FILTERS: Mapping[str, Filter] = {
    "form": well_formed(),
    "correct": correct(),
    "reward": rewarded(judgement, LEAST_JUDGEMENT),
    "protocol": obeys_protocol(),
}
"""The four filters, by the names that the log counts them under."""


def sample_of(trajectory: Trajectory, objective: bool) -> Sample:
    """Return a scored trajectory as an answer. objective: whether its environment has right answers."""
    score = trajectory.score.value
    return Sample(
        prompt=trajectory.task.id,
        text=trajectory.texts[-1] if trajectory.texts else "",
        earlier=tuple(trajectory.texts[:-1]),
        pieces=None if trajectory.task.spelled_tags_are_noise else trajectory.last_pieces,
        messages=tuple(trajectory.messages),
        score=score if objective else None,
        judgement=None if objective else score,
        status=trajectory.score.status,
        truncated=trajectory.truncated,
        n_tokens=trajectory.length,
    )


def accept(trajectories: Sequence[Trajectory], environments: Mapping[str, Environment]) -> Accepted:
    """Accept the scored trajectories that pass the four filters. environments: by name."""
    samples = []
    for trajectory in trajectories:
        objective = environments[trajectory.task.environment].objective
        samples.append(sample_of(trajectory, objective))
    kept, report = reject(samples, FILTERS)

    # Answers to a prompt that are equal in every turn count once: the last of them, at the place of the first.
    distinct = {(sample.prompt, sample.earlier, sample.text): sample for sample in kept}
    tasks = {trajectory.task.id: trajectory.task for trajectory in trajectories}
    conversations = [(tasks[sample.prompt], list(sample.messages)) for sample in distinct.values()]
    counts = {"answers": report.samples, **report.rejected, "kept": report.kept}
    counts["kept, different"] = len(conversations)
    return Accepted(conversations, counts)


def hard_prompts(trajectories: Sequence[Trajectory], dropped: float) -> set[str]:
    """Return the ids of the prompts that remain when those with the shortest answers are dropped.

    Args:
        trajectories: answers to the prompts. Those whose environment failed have no length.
        dropped: share of the prompts of each environment.
    """
    by_environment: dict[str, list[Sample]] = {}
    for trajectory in trajectories:
        if trajectory.valid:
            group = by_environment.setdefault(trajectory.task.environment, [])
            group.append(sample_of(trajectory, objective=True))
    hard = set()
    for samples in by_environment.values():
        hard |= {sample.prompt for sample in drop_shortest(samples, dropped)}
    return hard


def drop_shortest(samples: Sequence[Sample], share: float = 0.5) -> list[Sample]:
    """Leave out the prompts with the shortest answers, with all their samples.

    A prompt's length is the mean n_tokens of its samples. Exactly floor(share * prompts) prompts are dropped;
    of equally long ones, those that came later. Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share = {share}: must lie between 0 and 1")
    lengths: dict[str, list[int]] = {}
    for sample in samples:
        lengths.setdefault(sample.prompt, []).append(sample.n_tokens)
    # The sort is stable: ties keep their order.
    longest_first = sorted(lengths, key=lambda prompt: -fmean(lengths[prompt]))
    dropped = int(share * len(lengths) + 1e-9)  # 0.29 * 100 is a little less than 29
    kept = set(longest_first[: len(lengths) - dropped])
    return [sample for sample in samples if sample.prompt in kept]
