"""Check what a run must show: five claims with their bounds, each met, not met, or not measured (paper section 4).

    reasoning RL    score after - score before >= 15 points, and the intervals do not overlap, on each trained task
    unified model   score of the unified model >= 90% of the expert's, on each task the expert was reinforced on
    tool calls      valid calls >= 95%, on each task with tools
    pathologies     incidence before / incidence after >= 5
    switch          the finished model thinks when asked to, and answers at once when not, every time

Scores are avg@k, the mean over k answers to each of n held-out problems, with 95% intervals as the evaluation logged
them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from minglm.common.log import Record
from minglm.report.records import (
    EvaluationRecord,
    Moment,
    PathologyRecord,
    RLRecord,
    select,
    stages_of,
)

MIN_GAIN = 0.15  # avg@k that RL adds to its cold start
MIN_KEPT = 0.90  # unified model's score over the expert's
MIN_VALID = 0.95  # share of valid tool calls
MIN_FALL = 5.0  # incidence of pathologies before over after
EXPERTS = ("reasoning", "agent", "chat")
FINISHED = ("unified", "general_rl", "pathology_rl")  # stages of the one model, in order


class Verdict(StrEnum):
    """Whether a run shows what a claim says."""

    MET = "met"
    """The log shows it."""
    NOT_MET = "not met"
    """The log shows the contrary."""
    NOT_MEASURED = "not measured"
    """The log does not hold the measurements."""


@dataclass(frozen=True)
class Claim:
    """One thing that a run must show."""

    name: str
    """The claim in words, with its bound."""
    measured: str
    """The measurement in words; empty when there is none."""
    verdict: Verdict


def verdict(holds: bool | None) -> Verdict:
    """Return the verdict; None: not measured."""
    if holds is None:
        return Verdict.NOT_MEASURED
    return Verdict.MET if holds else Verdict.NOT_MET


def percent(share: float | None, digits: int = 1) -> str:
    """Format 0.425 as '42.5%', and a missing or undefined share as 'n/a'."""
    if share is None or math.isnan(share):
        return "n/a"
    return f"{100 * share:.{digits}f}%"


def with_interval(share: float, low: float, high: float) -> str:
    """Format a share with its interval: '42.5% (38.1 to 46.9)'."""
    return f"{percent(share)} ({100 * low:.1f} to {100 * high:.1f})"


def score_text(score: EvaluationRecord) -> str:
    """Format avg@k with its interval."""
    return with_interval(score.avg, score.low, score.high)


def find_score(
    records: Sequence[Record], stage: str, env: str, thinking: bool = True
) -> EvaluationRecord | None:
    """Return the last evaluation of an environment after a stage, or None."""
    scores = select(records, EvaluationRecord, stage=stage, env=env, thinking=thinking)
    return scores[-1] if scores else None


def compare(
    records: Sequence[Record], before: str, after: str, env: str
) -> tuple[EvaluationRecord, EvaluationRecord] | None:
    """Return the scores of an environment after two stages: with thinking where both have it, else without.

    None when there is no such pair.
    """
    for thinking in (True, False):
        first = find_score(records, before, env, thinking)
        second = find_score(records, after, env, thinking)
        if first is not None and second is not None:
            return first, second
    return None


def trained_envs(records: Sequence[Record], stage: str) -> list[str]:
    """Return the environments that an RL stage trained on, in the order of its log."""
    envs = {}
    for step in select(records, RLRecord, stage=stage):
        envs |= dict.fromkeys(step.reward_by_env)
    return list(envs)


def claim_gain(records: Sequence[Record]) -> Claim:
    """Check that reasoning RL lifts its expert over cold-start SFT, with intervals apart."""
    name = "reasoning RL gains 15 points or more, intervals apart"
    results = []
    texts = []
    for env in trained_envs(records, "reasoning.rl"):
        pair = compare(records, "reasoning.sft", "reasoning.rl", env)
        if pair is None:
            continue
        before, after = pair
        gain = after.avg - before.avg
        results.append(gain >= MIN_GAIN and after.low > before.high)
        texts.append(
            f"{env}: {score_text(before)} to {score_text(after)}, {100 * gain:+.1f} points"
        )
    return Claim(name, "; ".join(texts), verdict(all(results) if results else None))


def claim_kept(records: Sequence[Record]) -> Claim:
    """Check that the unified model keeps each expert's score on the tasks the expert was reinforced on."""
    name = "the unified model keeps 90% of each expert's score"
    results = []
    texts = []
    for expert in EXPERTS:
        for env in trained_envs(records, f"{expert}.rl"):
            pair = compare(records, f"{expert}.rl", "unified", env)
            if pair is None:
                continue
            best = pair[0].avg
            unified = pair[1].avg
            results.append(best > 0 and unified >= MIN_KEPT * best)
            share = percent(unified / best, 0) if best else "nothing to keep"
            texts.append(f"{env} {share} ({percent(best)} to {percent(unified)})")
    return Claim(name, ", ".join(texts), verdict(all(results) if results else None))


def last_scores(records: Sequence[Record]) -> list[EvaluationRecord]:
    """Return the evaluations of the finished model: of its last stage that has any, once the experts are unified."""
    stages = [stage for stage in stages_of(records, EvaluationRecord) if stage in FINISHED]
    return select(records, EvaluationRecord, stage=stages[-1]) if stages else []


def claim_calls(records: Sequence[Record]) -> Claim:
    """Check that the finished model's tool calls are valid, on every task with tools."""
    name = "valid tool calls in 95% of cases or more"
    shares: dict[str, float] = {}
    for score in last_scores(records):
        if score.valid_calls is not None:
            shares[score.env] = min(score.valid_calls, shares.get(score.env, 1.0))
    holds = min(shares.values()) >= MIN_VALID if shares else None
    text = ", ".join(f"{env} {percent(share)}" for env, share in shares.items())
    return Claim(name, text, verdict(holds))


def claim_pathology(records: Sequence[Record]) -> Claim:
    """Check that the incidence of pathologies on adversarial prompts falls."""
    name = "pathologies fall five times or more"
    befores = select(records, PathologyRecord, when=Moment.BEFORE)
    afters = select(records, PathologyRecord, when=Moment.AFTER)
    if not befores or not afters:
        return Claim(name, "", Verdict.NOT_MEASURED)
    before = befores[-1]
    after = afters[-1]
    first = before.incidence["any"]
    last = after.incidence["any"]

    fall = f"{first / last:.1f} times" if last else f"to none in {after.n}"
    first_text = with_interval(first, before.low, before.high)
    last_text = with_interval(last, after.low, after.high)
    holds = first > 0 and last <= first / MIN_FALL
    return Claim(name, f"{first_text} to {last_text}: {fall}", verdict(holds))


def claim_switch(records: Sequence[Record]) -> Claim:
    """Check that the finished model obeys the thinking switch every time, on and off."""
    name = "the thinking switch works every time"
    scores = last_scores(records)
    latest = {(score.env, score.thinking): score for score in scores}
    both_ways = {thinking for _, thinking in latest} == {True, False}
    holds = min(score.switch_ok for score in latest.values()) == 1 if both_ways else None

    failing = []
    for score in latest.values():
        if score.switch_ok < 1:
            mode = "on" if score.thinking else "off"
            failing.append(f"{score.env}, {mode}: {percent(score.switch_ok)}")
    text = "; ".join(failing)
    if scores and not failing:
        answers = sum(score.n * score.k for score in scores)
        text = f"obeyed in all of {answers} answers"
    return Claim(name, text, verdict(holds))


CLAIMS: tuple[Callable[[Sequence[Record]], Claim], ...] = (
    claim_gain,
    claim_kept,
    claim_calls,
    claim_pathology,
    claim_switch,
)
"""The claims, in the order of the report."""
