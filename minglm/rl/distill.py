"""Good answers become training data: rejection sampling and prompt selection (paper 3.1), self-distillation (3.3).

The experts answer each prompt several times, the unified model learns from the answers that pass four filters:

    form      not repetitive, not too short, not truncated, well-formed reasoning and calls
    correct   right, where an objective answer exists
    reward    liked by the reward model, where none exists
    protocol  tools used as agreed, and the expected end state reached

The same function closes the loop of the agentic section: train by reinforcement until a plateau, replace the cold-start
data by the policy's own accepted answers, fine-tune a fresh model on them, and go on with harder tasks.

Prompts are selected by the length of their answers: short answers mark easy prompts, and dropping the shorter half
raised the paper's mathematics and science scores by 2 to 4% with half of the data.

Choices: a filter is a predicate of one sample, so filters commute, and what is kept passes all of them when asked
again. The report counts every filter on every sample; a sample with two faults counts twice, whatever the order.
Simplified: duplicates are the business of `data.dedup`. The paper gives no thresholds.
"""

from dataclasses import dataclass
from statistics import fmean

from minglm.rewards.pathology import detect


@dataclass(frozen=True)
class Sample:
    """One answer of a teacher."""

    prompt: str
    """Id of the prompt; several answers share it."""
    text: str
    """The final assistant turn, raw, with special tokens spelled out."""
    messages: tuple = ()
    """The whole conversation."""
    score: float | None = None
    """What the environment gave, 0 to 1; None where no objective answer exists."""
    status: str = "ok"
    """Status of the score: ok, wrong, format or infrastructure."""
    truncated: bool = False
    """Whether the bound on new tokens cut it off."""
    n_tokens: int = 0
    """Tokens the teacher produced."""


def well_formed(min_tokens=1, language=None):
    """Filter one. Returns a predicate: long enough, not cut off, and none of the faults of `pathology.detect`."""

    def keep(sample):
        return (
            not sample.truncated
            and sample.n_tokens >= min_tokens
            and not any(detect(sample.text, language).values())
        )

    return keep


def correct(least=1.0):
    """Filter two. Returns a predicate: the objective score, where there is one, reaches `least`."""
    return lambda sample: sample.score is None or sample.score >= least


def rewarded(reward, least):
    """Filter three. Returns a predicate: where no objective score exists, `reward(sample)` reaches `least`."""
    return lambda sample: sample.score is not None or reward(sample) >= least


def obeys_protocol(reached=lambda sample: sample.status == "ok"):
    """Filter four. Returns a predicate: no malformed turn, and with tool calls: each answered in place, end reached.

    reached: callable, sample -> whether the expected end state was reached; by default the environment says so.
    A call in the last message needs no answer: it may be the act that ends the episode.
    """

    def keep(sample):
        open_calls, used = 0, False
        for message in sample.messages:
            if message["role"] == "tool":
                open_calls -= 1
            elif open_calls:
                return False
            else:
                open_calls = len(message.get("tool_calls") or ())
            if open_calls < 0:
                return False
            used |= open_calls > 0
        return sample.status not in ("format", "infrastructure") and (
            not used or bool(reached(sample))
        )

    return keep


def reject(samples, filters):
    """Keep the samples that pass every filter.

    filters: dict from a name to a predicate, Sample -> bool.
    Returns (kept, report): kept in the given order; report = {"samples", "kept", "rejected": {name: count}}.
    """
    kept, rejected = [], dict.fromkeys(filters, 0)
    for sample in samples:
        failed = [name for name, keep in filters.items() if not keep(sample)]
        for name in failed:
            rejected[name] += 1
        if not failed:
            kept.append(sample)
    return kept, {"samples": len(samples), "kept": len(kept), "rejected": rejected}


def accept(trajectories):
    """The trajectories that pass the three filters which need no reward model, equal answers to a prompt once.

    trajectories: of `minglm.rl.rollout`, scored. Returns ([(task, messages)], counts of answers, kept and rejected).
    """
    samples = [
        Sample(
            t.task.id,
            t.texts[-1],
            tuple(t.messages),
            t.score.value,
            t.score.status,
            t.truncated,
            t.length,
        )
        for t in trajectories
    ]
    filters = {"form": well_formed(), "correct": correct(), "protocol": obeys_protocol()}
    kept, report = reject(samples, filters)
    tasks = {t.task.id: t.task for t in trajectories}
    distinct = {(s.prompt, s.text): s for s in kept}.values()
    counts = {"answers": report["samples"], "kept": report["kept"], **report["rejected"]}
    return [(tasks[s.prompt], list(s.messages)) for s in distinct], counts


def drop_shortest(samples, share=0.5):
    """Leave out the prompts with the shortest answers, with all their samples.

    A prompt's length is the mean n_tokens of its samples. Exactly floor(share * prompts) prompts are dropped; of
    equally long ones, those that came later. Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share = {share}: must lie between 0 and 1")
    lengths = {}
    for sample in samples:
        lengths.setdefault(sample.prompt, []).append(sample.n_tokens)
    longest_first = sorted(
        lengths, key=lambda prompt: -fmean(lengths[prompt])
    )  # stable: ties keep their order
    dropped = int(share * len(lengths) + 1e-9)  # 0.29 * 100 is a little less than 29
    kept = set(longest_first[: len(lengths) - dropped])
    return [sample for sample in samples if sample.prompt in kept]
