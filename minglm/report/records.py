"""Declare every kind of record of RUN/log.jsonl, with units, and read a log back (paper section 4, protocol).

One dataclass is one kind of record: what is written, read, drawn and explained is declared here and nowhere else. A
field whose default is None is left out of the log where it is None; any other None is written as null.

The docstring of a field says what it measures and its unit. Fields with a paragraph "Healthy:" and one "Broken:" are
the metrics that someone watches: the README's tables are made from them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from minglm.common.files import read_jsonl
from minglm.common.log import Record
from minglm.common.mistakes import shown
from minglm.common.types import has_type, type_name, types_of


class Moment(StrEnum):
    """When pathologies were measured."""

    BEFORE = "before"
    """Before pathology RL: after general RL."""
    AFTER = "after"
    """After pathology RL."""


@dataclass(frozen=True, kw_only=True)
class StageRecord(Record):
    """A record of one stage."""

    stage: str
    """Name of the stage."""


@dataclass(frozen=True, kw_only=True)
class StartRecord(Record):
    """The head of a run's log, written once when the run begins."""

    kind: ClassVar[str] = "start"
    name: str
    """Name of the config."""
    config_hash: str
    """Hash of the resolved config."""
    seed: int
    """Seed of the run."""
    versions: dict[str, Any]
    """Versions of Python and packages, device, threads, commit and time (`minglm.common.version`)."""


@dataclass(frozen=True, kw_only=True)
class DataRecord(Record):
    """What data preparation made of the documents."""

    kind: ClassVar[str] = "data"
    tokens: dict[str, int]
    """Tokens of each source to train on."""
    documents: int
    """Documents used, repetitions included."""
    cleaning: dict[str, Any]
    """Documents that each step of the cleaning removed or repeated."""
    skipped: int
    """Input records that could not be used."""
    skipped_log: str
    """File that names them; empty when there are none."""
    seconds: float
    """Wall-clock seconds of the preparation."""
    skipped_reasons: dict[str, int] | None = None
    """The most frequent reasons why records could not be used; absent when there are none."""
    not_read: dict[str, int] | None = None
    """Files in folders of data that are of a kind that is not read, by suffix; absent when there are none."""


@dataclass(frozen=True, kw_only=True)
class StageBeginRecord(StageRecord):
    """The beginning of a stage."""

    kind: ClassVar[str] = "stage_begin"
    teaches: str
    """What the stage is for, in a few words."""
    tokens: int
    """Tokens to train on; an estimate after mid-training."""
    sequence_length: int
    """Positions of a row; for RL the bound on one answer, in tokens."""
    learning_rate: float
    """Peak learning rate."""
    note: str | None = None
    """What differs from the config: a row longer than a step; absent otherwise."""


@dataclass(frozen=True, kw_only=True)
class StageEndRecord(StageRecord):
    """The end of a stage, after its evaluation."""

    kind: ClassVar[str] = "stage_end"
    tokens: int
    """Tokens trained on."""
    seconds: float
    """Wall-clock seconds of training; of a stage that was stopped, since it was last continued."""
    evaluation_seconds: float
    """Wall-clock seconds of the evaluation after it."""


@dataclass(frozen=True, kw_only=True)
class ForgottenRecord(StageRecord):
    """A note in place of the records of a stage whose checkpoint was deleted, and which was trained again."""

    kind: ClassVar[str] = "forgotten"
    records: int
    """Records that stood here."""


@dataclass(frozen=True, kw_only=True)
class EndRecord(Record):
    """The end of the run: every stage is complete."""

    kind: ClassVar[str] = "end"
    seconds: float
    """Wall-clock seconds of data preparation, training and evaluation together."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one optimizer step measures."""

    loss: float
    """Mean over target tokens of -log p(next token), nats.

    Healthy: starts near log(vocabulary) (7.6 for 2,048), falls fast, then slowly
    Broken: starts far above: initialisation; flat: learning rate 0 or all targets masked; jumps and stays: learning
    rate too high
    """
    mtp_loss: float
    """Mean over target tokens of -log p(token after next) under the MTP layer, nats; 0 when it is not trained.

    Healthy: equal to `loss` while only frequencies are learned, then above it by a few tenths
    Broken: below `loss`: it sees its own target; far above and flat: its input is shifted by one
    """
    balance_loss: float
    """E times the sum over experts of (share of choices) times (mean share of scores), per sequence; no unit.

    Healthy: 1.0 at perfect balance, up to about 1.3
    Broken: climbs towards E / K: the same few experts take every token
    """
    learning_rate: float
    """Learning rate of the step."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping.

    Healthy: below 1 most of the time after warm-up
    Broken: always at the clip's bound: the rate is too high; 0: all targets masked; not finite: that step was skipped
    """
    mtp_weight: float
    """Weight of the MTP loss."""
    left_out: str | None = None
    """Why the step was skipped: "not finite", or "spike" (`--optimizer.spike_factor`); absent when it was taken.

    Healthy: absent
    Broken: several in a row: with `--optimizer.rollback_after` the last good checkpoint is restored, as a record
    "rollback" says
    """
    rank_load_max_over_mean: list[float] | None = None
    """Tokens at the busiest of the ranks that divide the experts, over the mean, per MoE layer; absent with ep = 1.

    Healthy: 1.0 to 1.3; all ranks wait for the busiest one
    Broken: as for the experts
    """
    load_max_over_mean: list[float] | None = None
    """Tokens of the busiest expert over the mean, per MoE layer, MTP last.

    Healthy: 1.1 to 2 once the bias has worked
    Broken: grows: the bias is not updated, or has the wrong sign; 2.0 from one step to the next and back: bias rate
    too high for so few tokens
    """
    load_entropy: list[float] | None = None
    """Entropy of the loads over log E, per MoE layer, MTP last; 1 is perfect balance.

    Healthy: above 0.95
    Broken: below 0.8: collapse
    """
    dead_experts: int | None = None
    """Experts without any token in this batch, all layers.

    Healthy: 0
    Broken: stays above 0: those experts never learn
    """
    bias_rate: float | None = None
    """Step of the router's selection bias."""


@dataclass(frozen=True, kw_only=True)
class StepRecord(StepMetrics, StageRecord):
    """One optimizer step of pre-training, mid-training or supervised fine-tuning."""

    kind: ClassVar[str] = "step"
    step: int
    """Number of the step in its stage, from 1."""
    tokens: int
    """Tokens seen since training began, this step included."""
    batch_tokens: int
    """Tokens of this batch."""
    tokens_per_second: int
    """Tokens of the batch over the wall-clock seconds of the step.

    Healthy: constant within a stage
    Broken: falls slowly: another process, or a leak
    """
    mfu: float | None = None
    """Model-FLOPs utilisation: `tokens_per_second` times the model's FLOPs per token (`minglm plan`; attention inside
    each document), over the FLOP/s of one large matrix product measured on this device at the start (on a CPU: in the
    time of one core, times the threads).

    Healthy: about constant within a stage, below 1; low where matrices are small, as in the toy
    Broken: far below: waiting for data, or too small a `microbatch_tokens`
    """


@dataclass(frozen=True, kw_only=True)
class RollbackRecord(StageRecord):
    """The return to the last checkpoint after several skipped steps in a row."""

    kind: ClassVar[str] = "rollback"
    step: int
    """The step after which the weights were restored."""
    to_step: int
    """The step whose weights were restored."""
    left_out: int
    """Steps skipped in this stage up to now."""


@dataclass(frozen=True, kw_only=True)
class SlowRankRecord(StageRecord):
    """A rank that is much slower than the others, which wait for it in every step."""

    kind: ClassVar[str] = "slow_rank"
    step: int
    """The step after which all ranks timed the same matrix product."""
    rank: int
    """The slowest rank."""
    host: str
    """Its machine."""
    times_the_median: float
    """Its time for the product, in times of the median rank."""


@dataclass(frozen=True, kw_only=True)
class RLRecord(StageRecord):
    """One step of reinforcement learning: a rollout, and its updates."""

    kind: ClassVar[str] = "rl"
    step: int
    """Number of the step in its stage, from 1."""
    seconds: float
    """Wall-clock seconds of rollout and updates."""
    reward: float | None = None
    """Mean score over all samples of the rollout, 0 to 1; absent when every environment failed.

    Healthy: rises, noisily
    Broken: falls for many steps: tasks too hard, or rate too high
    """
    reward_by_env: dict[str, float]
    """Mean score of each environment; one that always failed is missing."""
    reward_parts: dict[str, float] | None = None
    """Mean of each part of a composed reward: rules, critic, rubric, reward_model; absent where rules alone decide.

    Healthy: rise together
    Broken: one rises while the rules fall: the policy has found what that part pays for (reward hacking)
    """
    length: float | None = None
    """Mean tokens that the model produced per episode; absent when every environment failed.

    Healthy: moves slowly
    Broken: runs to the limit or to almost nothing: the reward pays for length
    """
    truncated: float | None = None
    """Share of samples stopped by the token limit; absent when every environment failed.

    Healthy: below 0.05
    Broken: above: the limit hides answers from the reward
    """
    switch_ok: float | None = None
    """Share of answers that think when asked to and do not when not; absent when every environment failed.

    Healthy: 1
    Broken: below: the data has thinking in the wrong half
    """
    valid_calls: float | None
    """Tool calls without a format fault over all tool calls; null when there was no call.

    Healthy: above 0.95
    Broken: below: the template in training and in generation differ
    """
    incidence: dict[str, float]
    """Share of answers with mixed languages, repetition, broken format, or any of them; empty without answers.

    Healthy: below 0.05
    Broken: rises with the reward: the reward pays for it
    """
    live_groups: float
    """Share of prompts whose samples differ in reward.

    Healthy: 0.2 to 0.8
    Broken: near 0: tasks too easy or impossible, nothing is learned
    """
    skipped: bool
    """Whether no weight moved: fewer than two groups were live, or the guard left out every update (`left_out`).

    Healthy: rare
    Broken: most steps: see `live_groups`
    """
    temperature: float | None = None
    """Temperature of the rollout and of the loss; absent in older logs."""
    tier: str | None = None
    """Tier of the problems: moderate or extreme; absent without a curriculum."""
    groups: int | None = None
    """Groups drawn: one for each prompt of the step, and the refilled ones; absent in older logs."""
    discarded: int | None = None
    """Groups among them without signal, which nothing is learned from; absent in older logs."""
    refilled: int | None = None
    """Groups drawn in place of groups without signal; absent where `refill` is 0.

    Healthy: below the number of prompts
    Broken: `refill` times the prompts: the tasks are too easy or impossible, most of the time goes into nothing
    """
    staleness: list[int] | None = None
    """Sampled tokens by the age of the weights that drew them, in versions from 0; absent where all are of the newest.

    Healthy: nothing beyond `asynchronous.max_staleness`
    Broken: most tokens at the bound: the rollouts wait for the trainer
    """
    spans: list[list[Any]] | None = None
    """[lane, phase, began, ended] of what ended in the step (`minglm.common.trace`), in seconds of the system's clock."""
    infrastructure: int | None = None
    """Samples left out because their environment failed; absent when none did."""
    segment_tokens: int | None = None
    """Tokens of the segments that were trained on, prompts and tool results included; absent when skipped."""
    trained_tokens: int | None = None
    """Tokens of the policy gradient: those that the model sampled; absent when skipped."""
    ratio_max: float | None = None
    """Largest p(token) under the trained over the sampling policy; absent when skipped.

    Healthy: 1.0 in the first update of a rollout, to float error; below 2 later
    Broken: above 1.01 in a first update: engine and trainer disagree
    """
    clip_share: float | None = None
    """Share of tokens whose gradient the clip removed; absent when skipped.

    Healthy: 0 on policy, below 0.2 with several updates
    Broken: above: too many updates, or rate too high
    """
    kl: float | None = None
    """Mean of r - 1 - log r with r = p(trained) / p(sampled), nats; absent when skipped.

    Healthy: about 0 on policy
    Broken: grows within a rollout: too many updates, or rate too high
    """
    mtp_loss: float | None = None
    """Cross-entropy of the MTP layer on the sampled tokens, nats; absent with `mtp_loss_weight` = 0, or when skipped.

    Healthy: follows `entropy`, somewhat above it
    Broken: rises while `entropy` falls: the layer does not keep up with the policy
    """
    gap_mean: float | None = None
    """Mean over the sampled tokens of |log p(trainer) - log p(engine)| before the first update, nats; absent when skipped.

    Healthy: about 1e-6 in float32, flat over the steps
    Broken: grows over the steps: the engine has other weights, or reads other text, than the trainer
    """
    gap_p99: float | None = None
    """That difference which 99% of the tokens do not exceed, nats; absent when skipped.

    Healthy: a few times `gap_mean`
    Broken: many times `gap_mean`: the routers choose other experts for some tokens
    """
    gap_worst: float | None = None
    """The largest of these differences, nats; absent when skipped.

    Healthy: below 1e-3 in float32
    Broken: above: a token that the clip removes, or whose gradient is wrong
    """
    gap_kl: float | None = None
    """Mean of r - 1 - log r with r = p(trainer) / p(engine) before the first update, nats; absent when skipped.

    Healthy: below 1e-6 in float32, below 0.015 with float8 rollouts
    Broken: above: the ratio of the loss is an artefact, not the change of the policy
    """
    capped_share: float | None = None
    """Share of tokens whose importance weight reached `loss.importance_cap`; absent without a cap, or when skipped.

    Healthy: below 0.01
    Broken: above 0.1: the sampling policy is not the trainer's; most of what is learned is cut off
    """
    reference_kl: float | None = None
    """Mean KL divergence from the weights at the beginning of the stage, nats; absent with `loss.beta` = 0.

    Healthy: grows slowly
    Broken: jumps: the policy has left what it learned before
    """
    gap_routing: float | None = None
    """Share of the engine's choices of experts that the trainer's routers would not have made, before the first update;
    absent without `routing_replay`.

    Healthy: below 1e-3 in float32; some percent with float8 rollouts
    Broken: above 0.1: the routers see other states than in the rollout
    """
    entropy: float | None = None
    """Mean entropy of the policy at its own tokens, nats; absent when skipped.

    Healthy: falls slowly, stays above 0
    Broken: falls to 0 in a few steps: collapse; rises without end: noise is learned
    """
    grad_norm: float | None = None
    """Global 2-norm of the gradient before clipping, in the last update; absent when skipped.

    Healthy: about constant
    Broken: always at the clip's bound: the rate is too high; not finite: that update was skipped
    """
    left_out: str | None = None
    """Why an update was skipped, the first of its rollout: "not finite", or "spike"; absent when all were taken.

    Healthy: absent
    Broken: several in a row: the gradients of this stage are not usable
    """


@dataclass(frozen=True, kw_only=True)
class ScreeningRecord(StageRecord):
    """How hard the problems of a stage are for its first weights (`minglm.rl.screening`)."""

    kind: ClassVar[str] = "screening"
    tiers: dict[str, int]
    """Problems of each tier: moderate, extreme, solved, unsolved, between.

    Healthy: enough moderate and extreme ones for several steps each
    Broken: all solved or all unsolved: the pool does not fit the model
    """
    answers: int
    """Answers drawn for them."""
    pass_rate: list[float]
    """Mean pass rate of the problems, and both ends of its 95% interval over problems."""
    extreme_rate: list[float] | None = None
    """The same of the problems drawn a second time, in that draw; absent without any."""
    held_out: int
    """Moderate development problems that guard the stage."""
    seconds: float
    """Wall-clock seconds of the screening."""


@dataclass(frozen=True, kw_only=True)
class MiningRecord(StageRecord):
    """Which prompts provoke faults in a stage's first model (`minglm.rl.mining`)."""

    kind: ClassVar[str] = "mining"
    asked: dict[str, int]
    """Prompts asked, by environment."""
    provoking: dict[str, int]
    """Those answered with a fault once or more, by environment: what the stage trains on.

    Healthy: enough for several steps
    Broken: empty: no kind of prompt provokes this model, and the stage is more of the RL before
    """
    answers: int
    """Answers drawn."""
    faulty: float
    """Share of them with a fault."""
    note: str | None = None
    """What follows where nothing provoked a fault; absent otherwise."""
    seconds: float
    """Wall-clock seconds of the mining."""


@dataclass(frozen=True, kw_only=True)
class RewardModelRecord(StageRecord):
    """What a stage's reward model is worth, on pairs that it was neither trained nor calibrated on."""

    kind: ClassVar[str] = "reward_model"
    pairs: int
    """Pairs that it was trained on."""
    measured: int
    """Pairs that it was measured on."""
    accuracy: float | None
    """Share of these whose better answer has the higher score; null without pairs.

    Healthy: above 0.8
    Broken: near 0.5: it prefers nothing, and its part of the reward is noise
    """
    longer_wrong: float | None
    """Share that it gets wrong where the worse answer is the longer one; null without such pairs.

    Healthy: as `shorter_wrong`
    Broken: above it: length is paid for
    """
    shorter_wrong: float | None
    """The same where the worse answer is the shorter one."""
    lively_wrong: float | None = None
    """Share of all pairs that it gets wrong once a lively phrase stands before the worse answer.

    Healthy: as 1 - `accuracy`
    Broken: above it: style is paid for
    """
    calibration_error: float | None
    """Mean distance of predicted probability and frequency."""
    seconds: float
    """Wall-clock seconds of its training."""


@dataclass(frozen=True, kw_only=True)
class CurriculumRecord(StageRecord):
    """A score of the held-out moderate problems, while hard ones are trained on."""

    kind: ClassVar[str] = "curriculum"
    step: int
    """Steps done."""
    score: float
    """Mean score of the problems, 0 to 1.

    Healthy: about `before`
    Broken: falls: the hard problems destroy what was learned; the weights are rolled back
    """
    before: float
    """Their mean score before the first hard step."""
    verdict: str
    """remembered, held, or fallen: then the weights are rolled back, and the rest of the steps is moderate."""
    problems: int
    """Problems scored."""
    seconds: float
    """Wall-clock seconds of the check."""


@dataclass(frozen=True, kw_only=True)
class TemperatureRecord(StageRecord):
    """A plateau of the reward, and what scoring a range of temperatures led to (`minglm.rl.temperature`)."""

    kind: ClassVar[str] = "temperature"
    step: int
    """The step after which the reward stood still."""
    before: float
    """The temperature up to this step."""
    after: float
    """The temperature from the next step on."""
    verdict: str
    """Whether it was raised, kept or lowered: a `Verdict`."""
    probed: list[list[float]]
    """[temperature, mean score, upper bound of its cost beyond the drop] of every temperature; safe below 0.

    Healthy: scores fall slowly along the temperatures
    Broken: no cost below 0 in any probe: too few problems for so small a `drop`
    """
    problems: int
    """Development problems that were scored at every temperature."""
    seconds: float
    """Wall-clock seconds of the probe."""


ORACLE = "prompts that the oracle answered, because no answer of the expert was right"
"""What `RejectionRecord` counts for an environment that would be missing from the unified model."""


@dataclass(frozen=True, kw_only=True)
class RejectionRecord(Record):
    """What rejection sampling did with the experts' answers."""

    kind: ClassVar[str] = "rejection"
    counts: dict[str, int]
    """By "EXPERT, ENVIRONMENT: WHAT": prompts, those left out, answers drawn, rejected by each filter, kept, prompts of the
    oracle. Older logs have them by "EXPERT: WHAT".
    """


@dataclass(frozen=True, kw_only=True)
class OnPolicyRecord(StageRecord):
    """One step of on-policy distillation (`minglm.rl.unify`): the student answered, the experts judged its tokens."""

    kind: ClassVar[str] = "on_policy"
    step: int
    """Number of the step, from 1."""
    tokens: int
    """Tokens of this stage so far, prompts included."""
    reverse_kl: float
    """Mean of log student - log expert over the drawn tokens, nats.

    Healthy: falls towards 0
    Broken: stands still: the rate is too low, or the student never says what an expert likes
    """
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    seconds: float
    """Wall-clock seconds of the step."""


@dataclass(frozen=True, kw_only=True)
class ConversationsRecord(StageRecord):
    """What a stage of fine-tuning learns from: one example for each user turn of a conversation."""

    kind: ClassVar[str] = "conversations"
    examples: dict[str, int]
    """Examples of each environment."""
    too_long: dict[str, int]
    """Those of them that were left out, because they are longer than a row.

    Healthy: empty
    Broken: all examples of an environment: it is not learned; raise `sequence_length`
    """
    tokens: dict[str, int] | None = None
    """Tokens of the others; training draws each environment in this proportion. Absent in older logs."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(StageRecord):
    """Scores of one environment's held-out tasks after a stage."""

    kind: ClassVar[str] = "evaluation"
    env: str
    """Name of the environment."""
    group: str
    """Group of the environment: reasoning, agentic, chat, ..."""
    thinking: bool
    """Whether thinking was switched on."""
    avg: float
    """avg@k: mean over problems of the mean score over k answers, 0 to 1.

    Healthy: above the chance of guessing, intervals of two stages apart before one is called better
    Broken: at chance: the answer is not parsed, or was never learned
    """
    low: float
    """Lower end of the 95% interval of `avg`, over problems."""
    high: float
    """Upper end of the 95% interval of `avg`, over problems."""
    pass_k: float
    """pass@k: share of problems with a right answer among k.

    Healthy: above avg@k
    Broken: equal to avg@k: sampling has no variety left
    """
    k: int
    """Answers to each problem."""
    n: int
    """Problems."""
    valid_calls: float | None
    """Tool calls without a format fault over all tool calls; null without calls or tools.

    Healthy: above 0.95
    Broken: below: the template in training and in generation differ
    """
    switch_ok: float
    """Share of answers that think when asked to and do not when not.

    Healthy: 1
    Broken: below: the unified data has thinking in the wrong half
    """
    length: float
    """Mean tokens that the model produced per answer."""
    infrastructure: int | None = None
    """Samples left out because their environment failed; absent when none did."""
    by_problem: list[float | None] | None = None
    """Mean score of the answers to each problem, null where its environment failed; the same problems in every stage."""
    levels: list[int] | None = None
    """Difficulty of each problem, in the order of `by_problem`; absent in older logs."""
    shown_shares: dict[str, float] | None = None
    """Share of each difficulty in the demonstrations of the cold start; absent in older logs."""


@dataclass(frozen=True, kw_only=True)
class SampleRecord(StageRecord):
    """One dialogue of an evaluation, to be read."""

    kind: ClassVar[str] = "sample"
    title: str
    """Environment, and whether thinking was on."""
    text: str
    """The dialogue as the chat template renders it."""


@dataclass(frozen=True, kw_only=True)
class PathologyRecord(StageRecord):
    """Pathologies in answers to held-out prompts of the kinds that are mined, before or after pathology RL."""

    kind: ClassVar[str] = "pathology"
    when: str
    """Whether it was before or after pathology RL: a `Moment`."""
    incidence: dict[str, float]
    """Share of answers with each pathology, and with "any".

    Healthy: falls by half or more from before to after
    Broken: unchanged: the penalty is too small, or too few prompts provoke the fault
    """
    n: int
    """Answers judged."""
    low: float
    """Lower end of the 95% interval of the share with any pathology, over prompts."""
    high: float
    """Upper end of the 95% interval of the share with any pathology, over prompts."""
    audit: dict[str, float] | None = None
    """Share of answers with each flag of detectors that training did not use, and with "any".

    Healthy: falls with `incidence`
    Broken: stays or rises: what training's own detectors overlook was learned
    """
    content: float | None = None
    """Mean share of what was asked for that holds: the constraints of a request, the fact that a prompt is about.

    Healthy: stays, or rises
    Broken: falls: saying little, or the same to everything, was learned
    """
    by_kind: dict[str, dict[str, float]] | None = None
    """Share of answers with a "fault" and with a "flag", and mean "content", by environment."""
    by_prompt: dict[str, list[float]] | None = None
    """The same for each prompt, in the same order before and after."""


@dataclass(frozen=True, kw_only=True)
class BitsPerByteRecord(StageRecord):
    """How well a stage predicts held-out text."""

    kind: ClassVar[str] = "bits_per_byte"
    source: str
    """Source of the text."""
    value: float
    """-log2 p of held-out text over its bytes; does not depend on the tokenizer. Bits per byte.

    Healthy: falls over pre-training, may rise a little afterwards
    Broken: far below the training loss: held-out text was trained on
    """


@dataclass(frozen=True, kw_only=True)
class MTPAcceptanceRecord(StageRecord):
    """How well the MTP layer agrees with the trunk: whether its drafts are worth their time."""

    kind: ClassVar[str] = "mtp_acceptance"
    on: str = "text"
    """What was predicted: "text", held-out code, or "tasks", the model's own answers to the test tasks of the stage."""
    value: float
    """Mean of the overlap, sum over tokens of min(p, q), of MTP layer and trunk: the share of drafts accepted.

    Healthy: 0.4 to 0.9, and no lower after a stage than before it
    Broken: near 0: the layer was lost on saving, or its input is shifted; falls stage by stage: it is not trained with them
    """


@dataclass(frozen=True, kw_only=True)
class NeedleRecord(StageRecord):
    """The needle test at one length and depth, after a stage with longer rows than the one before."""

    kind: ClassVar[str] = "needle"
    length: int
    """Tokens of a row."""
    depth: float
    """Where the needle is hidden: 0 at the beginning of the row, 1 right before the question."""
    found: float
    """Share of rows whose key, hidden at `depth` of `length` tokens, is what greedy decoding would say.

    Healthy: 1 at every depth, for a model large enough; `nats` of the answer falls first
    Broken: falls with length: RoPE base not raised, or rows too few; only at depth 1: it copies the last thing said
    """
    nats: float
    """Mean over rows of -log p of the answer per token, nats."""


@dataclass(frozen=True, kw_only=True)
class BitsByPositionRecord(StageRecord):
    """Bits per byte along a row, after a stage with longer rows than the one before."""

    kind: ClassVar[str] = "bits_by_position"
    source: str
    """Source of the text."""
    length: int
    """Tokens of a row."""
    bits: list[list[float | None]]
    """[first position, end, bits per byte] of each bin of positions, over documents that fill a row; null without text.

    Healthy: falls along the row
    Broken: rises beyond the length of an earlier stage: positions never trained
    """


RECORDS: dict[str, type[Record]] = {
    record.kind: record
    for record in list(globals().values())
    if isinstance(record, type) and issubclass(record, Record) and "kind" in vars(record)
}
"""The dataclass of each kind of record."""

R = TypeVar("R", bound=Record)


def parse(values: Any) -> Record:
    """Convert a line of a log to its record.

    Raises ValueError for a kind or a field that is not declared here, and for a value of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{shown(values, quoted=True)} is no record")
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in RECORDS:
        raise ValueError(
            f"log record of unknown kind {shown(kind, quoted=True)}; it was written by another version"
        )
    fields = {name: value for name, value in values.items() if name != "kind"}
    try:
        record = RECORDS[kind](**fields)
    except TypeError as error:
        reason = str(error).partition("__init__() ")[2]
        raise ValueError(
            f"log record {kind!r}: {reason}; it was written by another version"
        ) from None
    types = types_of(RECORDS[kind])
    for name, value in fields.items():
        if not has_type(value, types[name]):
            raise ValueError(
                f"log record {kind!r}: {name} = {shown(value, quoted=True)} is no "
                f"{type_name(types[name])}; restore the file"
            )
    return record


def read_records(path: str | Path) -> list[Record]:
    """Read the records of a log in order; an empty list when there is no file. Raises ValueError as `parse` does."""
    records = []
    for number, values in enumerate(read_jsonl(path), 1):
        try:
            records.append(parse(values))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return records


def select(records: Iterable[Record], kind: type[R], **where: object) -> list[R]:
    """Return the records of one kind whose fields equal those given, in order."""
    return [
        record
        for record in records
        if isinstance(record, kind)
        and all(getattr(record, name) == value for name, value in where.items())
    ]


def stages_of(records: Iterable[Record], *kinds: type[StageRecord]) -> list[str]:
    """Return the names of the stages that have records of these kinds, in the order in which they happened."""
    names = [record.stage for record in records if isinstance(record, kinds)]
    return list(dict.fromkeys(names))
