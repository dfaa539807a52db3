"""Check what a run must show: six claims with their bounds, each met, not met, or not measured (paper section 4).

    reinforcement   RL - the better of base and cold start >= 10 points, on instructions and another task
    against SFT     RL - as much more fine-tuning > 0, on each task of the first claim that has this gain
    unified model   unified - base >= 90% of expert - base, on each task whose expert gained
    tool calls      valid calls >= 95%, on each task with tools
    pathologies     incidence after <= half of before, and so beyond doubt; flags of the audit fall; content stays
    switch          the finished model thinks when asked to, and answers at once when not, every time

Scores are avg@k, the mean over k answers to each of n held-out problems. Differences are paired: two stages answer the
same problems, and the 95% interval is a bootstrap over problems. A difference counts where its interval lies above 0.

Choices: RL is compared with the better of two starts, because a cold start that breaks something is easily mended; and
with a control, which has the same start and learns from as many tokens of more solutions, because training longer helps
too. No pathology is planted: they are counted on held-out prompts of the kinds that provoke the model (`minglm.rl.mining`),
by training's detectors and by others (`minglm.eval.pathologies`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from minglm.common.log import Record
from minglm.common.statistics import Difference, paired_difference
from minglm.report.records import (
    EvaluationRecord,
    Moment,
    PathologyRecord,
    RLRecord,
    select,
    stages_of,
)

MIN_GAIN = 0.10  # avg@k that RL adds to the better start
HEADLINE = "instructions"  # the task that has to gain
MIN_GAINING = 2  # tasks that have to gain, the headline among them
MIN_KEPT = 0.90  # share of an expert's gain over the base that the unified model keeps
MIN_VALID = 0.95  # share of valid tool calls
MIN_FALL = 2.0  # incidence of pathologies before over after
MAX_LOSS = 0.02  # of content
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


def verdict_of_all(results: Sequence[bool | None]) -> Verdict:
    """Return the verdict on something that must hold for each of several tasks; None: not measured for that task."""
    if False in results:
        return Verdict.NOT_MET
    return verdict(None if None in results or not results else True)


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


def points(difference: Difference) -> str:
    """Format a difference with its interval: '+12.5 points (8.1 to 16.9)'."""
    mean, low, high = (100 * value for value in difference)
    return f"{mean:+.1f} points ({low:.1f} to {high:.1f})"


def paired(before: EvaluationRecord | None, after: EvaluationRecord | None) -> Difference | None:
    """Return the difference of two scores of the same problems; None where one, or its scores by problem, is missing.

    A brief evaluation has the first problems of a longer one.
    """
    if before is None or after is None or before.by_problem is None or after.by_problem is None:
        return None
    common = min(len(before.by_problem), len(after.by_problem))
    return paired_difference(before.by_problem[:common], after.by_problem[:common])


def trained_envs(records: Sequence[Record], stage: str) -> list[str]:
    """Return the environments that an RL stage trained on, in the order of its log."""
    envs = {}
    for step in select(records, RLRecord, stage=stage):
        envs |= dict.fromkeys(step.reward_by_env)
    return list(envs)


def base_stage(records: Sequence[Record]) -> str | None:
    """Return the last stage that was scored before the experts, or None: where all of them start."""
    stages = []
    for stage in stages_of(records, EvaluationRecord):
        if "." not in stage and stage not in FINISHED:
            stages.append(stage)
    return stages[-1] if stages else None


class Gain(NamedTuple):
    """What an expert's RL did to one of its tasks, with thinking on."""

    env: str
    base: EvaluationRecord
    cold_start: EvaluationRecord
    control: EvaluationRecord | None
    expert: EvaluationRecord
    over_start: Difference
    """Over `start`."""
    over_control: Difference | None
    """Over as much more fine-tuning of the cold start; None where the control has no score."""
    over_base: Difference

    @property
    def start(self) -> EvaluationRecord:
        """Return the score of the better start; of two equal ones the cold start, from which RL began."""
        return max(self.cold_start, self.base, key=lambda score: score.avg)

    @property
    def is_gain(self) -> bool:
        """Return whether the gain over the better start is as large as the claim asks, and beyond doubt."""
        return self.over_start.mean >= MIN_GAIN and self.over_start.low > 0


def gains(records: Sequence[Record]) -> list[Gain]:
    """Return the gain of each task that an expert was reinforced on; those whose scores cannot be paired are missing."""
    base = base_stage(records)
    if base is None:
        return []
    found = []
    for expert in EXPERTS:
        for env in trained_envs(records, f"{expert}.rl"):
            scores = [
                find_score(records, stage, env)
                for stage in (base, f"{expert}.sft", f"{expert}.control", f"{expert}.rl")
            ]
            at_base, cold_start, control, after = scores
            if at_base is None or cold_start is None or after is None:
                continue
            over_base = paired(at_base, after)
            over_cold_start = paired(cold_start, after)
            if over_base is None or over_cold_start is None:
                continue
            is_broken = at_base.avg > cold_start.avg
            found.append(
                Gain(
                    env=env,
                    base=at_base,
                    cold_start=cold_start,
                    control=control,
                    expert=after,
                    over_start=over_base if is_broken else over_cold_start,
                    over_control=paired(control, after),
                    over_base=over_base,
                )
            )
    return found


def claim_gain(records: Sequence[Record]) -> Claim:
    """Check that RL lifts instructions and another task over the better of base and cold start."""
    name = "RL gains 10 points on instructions and another task, over the better of base and cold start"
    found = gains(records)
    texts = []
    for gain in found:
        scores = f"{percent(gain.start.avg)} ({gain.start.stage}) to {percent(gain.expert.avg)}"
        texts.append(f"{gain.env}: {scores}, {points(gain.over_start)}")
    gaining = [gain.env for gain in found if gain.is_gain]
    holds = HEADLINE in gaining and len(gaining) >= MIN_GAINING
    return Claim(name, "; ".join(texts), verdict(holds if found else None))


def claim_control(records: Sequence[Record]) -> Claim:
    """Check that what RL gains is more than as much further fine-tuning gains."""
    name = "RL gains more than as much fine-tuning does, on each of these tasks"
    results = []
    texts = []
    for gain in gains(records):
        if not gain.is_gain:
            continue
        if gain.control is None or gain.over_control is None:
            results.append(None)
            texts.append(f"{gain.env}: no control")
        else:
            results.append(gain.over_control.low > 0)
            scores = f"{percent(gain.control.avg)} to {percent(gain.expert.avg)}"
            texts.append(f"{gain.env}: {scores}, {points(gain.over_control)}")
    return Claim(name, "; ".join(texts), verdict_of_all(results))


def claim_kept(records: Sequence[Record]) -> Claim:
    """Check that the unified model keeps what each expert gained over the base."""
    name = "the unified model keeps 90% of each expert's gain over the base"
    results = []
    texts = []
    for gain in gains(records):
        unified = find_score(records, "unified", gain.env)
        kept = paired(gain.base, unified)
        if unified is None or kept is None:
            results.append(None)
            continue
        scores = [percent(score.avg) for score in (gain.base, gain.expert, unified)]
        text = f"{gain.env}: {scores[0]} (base), {scores[1]} (expert), {scores[2]}"
        if gain.over_base.low <= 0:
            texts.append(f"{text}, no gain to keep")
            continue
        share = kept.mean / gain.over_base.mean
        results.append(share >= MIN_KEPT)
        texts.append(f"{text}, keeps {percent(share, 0)}")
    return Claim(name, "; ".join(texts), verdict_of_all(results))


def last_scores(records: Sequence[Record]) -> list[EvaluationRecord]:
    """Return the evaluations of the finished model, on the tasks that it learned: those scored from `unified` on.

    Its last stage that has any; the twelve tasks of Figure 1, of which it never saw most, are scored only there.
    """
    stages = [stage for stage in stages_of(records, EvaluationRecord) if stage in FINISHED]
    if not stages:
        return []
    learned = {score.env for score in select(records, EvaluationRecord, stage=stages[0])}
    last = select(records, EvaluationRecord, stage=stages[-1])
    return [score for score in last if score.env in learned]


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


def pathologies(records: Sequence[Record]) -> tuple[PathologyRecord, PathologyRecord] | None:
    """Return what was measured before and after pathology RL; None where that is not the same prompts."""
    befores = select(records, PathologyRecord, when=Moment.BEFORE)
    afters = select(records, PathologyRecord, when=Moment.AFTER)
    if not befores or not afters:
        return None
    before, after = befores[-1], afters[-1]
    sizes = [len((record.by_prompt or {}).get("fault", ())) for record in (before, after)]
    return (before, after) if sizes[0] == sizes[1] > 0 else None


def claim_pathology(records: Sequence[Record]) -> Claim:
    """Check that RL on mined prompts cures faults on others of the same kinds, for other detectors too, and costs nothing."""
    name = (
        "faults fall by half on prompts of the kinds that provoke them, flags of detectors that training did not use "
        "fall too, and the content does not"
    )
    found = pathologies(records)
    if found is None:
        return Claim(name, "", Verdict.NOT_MEASURED)
    before, after = found
    changes = {}
    for measure in ("fault", "flag", "content"):
        first, last = ((record.by_prompt or {})[measure] for record in found)
        changes[measure] = paired_difference(first, last)
    first = before.incidence["any"]
    last = after.incidence["any"]
    holds = (
        first > 0
        and last <= first / MIN_FALL
        and changes["fault"].high < 0
        and changes["flag"].high < 0
        and changes["content"].mean >= -MAX_LOSS
    )
    first_text = with_interval(first, before.low, before.high)
    last_text = with_interval(last, after.low, after.high)
    flags = f"flagged {points(changes['flag'])}"
    content = f"content {points(changes['content'])}"
    return Claim(name, f"{first_text} to {last_text}; {flags}; {content}", verdict(holds))


def claim_switch(records: Sequence[Record]) -> Claim:
    """Check that the finished model obeys the thinking switch every time, on and off."""
    name = "the thinking switch works every time"
    latest = {(score.env, score.thinking): score for score in last_scores(records)}
    both_ways = {thinking for _, thinking in latest} == {True, False}
    holds = min(score.switch_ok for score in latest.values()) == 1 if both_ways else None

    failing = []
    for score in latest.values():
        if score.switch_ok < 1:
            mode = "on" if score.thinking else "off"
            failing.append(f"{score.env}, {mode}: {percent(score.switch_ok)}")
    text = "; ".join(failing)
    if latest and not failing:
        answers = sum(score.n * score.k for score in latest.values())
        text = f"obeyed in all of {answers} answers"
    return Claim(name, text, verdict(holds))


CLAIMS: tuple[Callable[[Sequence[Record]], Claim], ...] = (
    claim_gain,
    claim_control,
    claim_kept,
    claim_calls,
    claim_pathology,
    claim_switch,
)
"""The claims, in the order of the report."""
