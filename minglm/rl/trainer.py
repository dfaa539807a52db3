"""Train on rewarded groups: advantages, clipped policy gradient, optimizer step, with no KL term (paper 3.2, 3.3).

    groups -> rewards -> advantages within each group -> loss per token -> one number -> gradient -> step

Groups whose samples all got the same reward carry no signal and are left out before any gradient is computed. With
fewer than two informative groups the step is skipped, because an optimizer that normalises would turn noise into a
full-size step. The gradient is computed in micro-batches of similar length, with one denominator counted over the
whole batch. A trajectory is one sample, however many segments it has: they share its advantage, its vote and its
update. The MTP layer and the router's selection bias stay as they are. A gradient that is not finite, or that is a
spike (`train.guard`), is not used, and the log says so.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minglm.config import OptimizerConfig, RLConfig
from minglm.model.glm import GLM
from minglm.parallel import Replicas, Workers
from minglm.rewards.shaping import shaped_reward
from minglm.rl.aggregation import aggregate, denominator
from minglm.rl.episode import Segment, Trajectory
from minglm.rl.grpo import PolicyMetrics, advantages, informative_groups, policy_loss
from minglm.train.guard import Guard, guarded_step
from minglm.train.state import TrainingState

MICROBATCH_TOKENS = 8192
WARMUP_STEPS = 5
MIN_INFORMATIVE_GROUPS = 2


class Sample(NamedTuple):
    """A trajectory to learn from."""

    segments: Sequence[Segment]
    advantage: float


class Row(NamedTuple):
    """A segment of a trajectory, and what the loss needs to know of the whole."""

    segment: Segment
    advantage: float
    owner: int
    """Number of the trajectory in its batch."""
    tokens: int
    """Sampled tokens of the whole trajectory."""


class SegmentBatch(NamedTuple):
    """Segments as tensors, padded on the right."""

    tokens_BS: Tensor
    """int64."""
    mask_BS: Tensor
    """bool, True on the tokens that the model sampled."""
    sampling_logprobs_BS: Tensor
    """float32, as the rollout engine recorded them; 0 elsewhere."""
    documents_BS: Tensor
    """int32, 0 in the segment and -1 on padding."""


class SampledLogProbabilities(NamedTuple):
    """What the model says of the tokens that were sampled."""

    logprobs_BS: Tensor
    """float32, at each sampled token its log-probability; 0 elsewhere."""
    entropy_sum: Tensor
    """Scalar float32: sum over the sampled tokens of the entropy that they were sampled from, nats."""


class MicrobatchLoss(NamedTuple):
    """The loss of a micro-batch, and its metrics."""

    loss: Tensor
    """A scalar, on which `backward()` is called."""
    metrics: PolicyMetrics
    entropy_sum: Tensor
    """Scalar: sum over the sampled tokens, nats."""


class GradientSums(NamedTuple):
    """Metrics of the micro-batches of one worker, already divided by the tokens of the whole batch."""

    ratio_max: float
    clip_share: float
    kl: float
    entropy: float


def collate(segments: Sequence[Segment], pad: int) -> SegmentBatch:
    """Return segments as tensors, padded on the right with the id `pad`."""
    length = max(len(segment.tokens) for segment in segments)

    def padded(rows: list[Any], fill: Any, dtype: torch.dtype) -> Tensor:
        filled = [[*row, *[fill] * (length - len(row))] for row in rows]
        return torch.tensor(filled, dtype=dtype)

    documents = [[0] * len(segment.tokens) for segment in segments]
    return SegmentBatch(
        tokens_BS=padded([s.tokens for s in segments], pad, torch.int64),
        mask_BS=padded([s.mask for s in segments], False, torch.bool),
        sampling_logprobs_BS=padded([s.logprobs for s in segments], 0.0, torch.float32),
        documents_BS=padded(documents, -1, torch.int32),
    )


def sampled_log_probabilities(
    model: GLM, tokens_BS: Tensor, mask_BS: Tensor, documents_BS: Tensor, temperature: float
) -> SampledLogProbabilities:
    """Return log-probabilities and entropies of the sampled tokens under the model.

    Args:
        model: the policy.
        tokens_BS: int64.
        mask_BS: bool, True on the sampled tokens; never on the first one of a row.
        documents_BS: int32 document ids, -1 on padding.
        temperature: the logits are divided by it, as in the rollout.
    """
    hidden_BSD = model.hidden(tokens_BS, documents_BS=documents_BS).hidden_BSD
    predicts_BS = mask_BS[:, 1:]  # position s - 1 predicts token s
    hidden_TD = hidden_BSD[:, :-1][predicts_BS]
    targets_T = tokens_BS[:, 1:][predicts_BS]
    logprobs_T, entropy_T = model.lm_head.token_log_probabilities(hidden_TD, targets_T, temperature)
    sampled_BS = torch.zeros_like(mask_BS)
    sampled_BS[:, 1:] = predicts_BS
    logprobs_BS = torch.zeros(mask_BS.shape, dtype=torch.float32, device=mask_BS.device)
    return SampledLogProbabilities(
        logprobs_BS.masked_scatter(sampled_BS, logprobs_T), entropy_T.sum()
    )


def rows_of(samples: Sequence[Sample]) -> list[Row]:
    """Return the segments of all trajectories, shortest first."""
    rows = []
    for owner, (segments, advantage) in enumerate(samples):
        tokens = sum(sum(segment.mask) for segment in segments)
        rows += [Row(segment, advantage, owner, tokens) for segment in segments]
    return sorted(rows, key=lambda row: len(row.segment.tokens))


def microbatches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Cut rows, shortest first, so that no padded micro-batch exceeds MICROBATCH_TOKENS."""
    microbatch: list[Row] = []
    for row in rows:
        longest = len(row.segment.tokens)
        if microbatch and longest * (len(microbatch) + 1) > MICROBATCH_TOKENS:
            yield microbatch
            microbatch = []
        microbatch.append(row)
    if microbatch:
        yield microbatch


def reward(trajectory: Trajectory, fault_penalty: float) -> float:
    """Return the score of a trajectory, less the penalty if its last turn has a fault or it disobeys the switch."""
    flags = trajectory.faults() if fault_penalty else {}
    return shaped_reward(trajectory.score.value, flags, trajectory.switch_obeyed, fault_penalty)


class PolicyTrainer:
    """The policy, its optimizer and its guard: makes updates of rewarded groups.

    Args:
        model: the policy.
        optimizer: its optimizer.
        config: settings of the RL stage.
        optimizer_config: bound on the gradient norm, and which steps are skipped; the learning rate is the stage's.
        pad: id of the padding token.
        workers: threads or ranks that share the samples of an update; None: the model alone.
    """

    def __init__(
        self,
        model: GLM,
        optimizer: torch.optim.Optimizer,
        config: RLConfig,
        optimizer_config: OptimizerConfig,
        pad: int,
        workers: Workers | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.clip_norm = optimizer_config.clip_norm
        self.pad = pad
        self.workers = workers or Replicas(model)
        self.guard = Guard(optimizer_config.spike_factor, optimizer_config.rollback_after)
        self.state = TrainingState(model, optimizer, self.guard)

    def learn(self, groups: Sequence[Sequence[Trajectory]], step: int) -> dict[str, Any]:
        """Turn rewarded groups into optimizer steps, `updates_per_rollout` of them. Return metrics for the log.

        step: number of the step from 0, for the warm-up. The metrics are fields of `RLRecord`.
        """
        penalty = self.config.fault_penalty
        rewards_PG = torch.tensor(
            [[reward(t, penalty) for t in group] for group in groups], dtype=torch.float32
        )
        valid_PG = torch.tensor([[t.valid for t in group] for group in groups])
        advantage_PG = advantages(rewards_PG, self.config.normalize_std, valid_PG)
        informative_P = informative_groups(rewards_PG, valid_PG)

        metrics: dict[str, Any] = {
            "live_groups": round(float(informative_P.float().mean()), 4),
            "skipped": int(informative_P.sum()) < MIN_INFORMATIVE_GROUPS,
        }
        if metrics["skipped"]:
            return metrics

        samples = []
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group):
                if informative_P[p] and valid_PG[p, g]:
                    samples.append(Sample(trajectory.segments, float(advantage_PG[p, g])))
        rows = rows_of(samples)
        metrics["segment_tokens"] = sum(len(row.segment.tokens) for row in rows)
        metrics["trained_tokens"] = sum(sum(row.segment.mask) for row in rows)

        # Each update gets every k-th trajectory of the rollout; the log shows the last one.
        reasons = []
        updates = min(self.config.updates_per_rollout, len(samples))
        for first in range(updates):
            share = samples[first :: self.config.updates_per_rollout]
            metrics |= self.update(share, self.learning_rate(step))
            reasons.append(metrics["left_out"])
        metrics["skipped"] = all(reasons)
        metrics["left_out"] = next(filter(None, reasons), None)
        return metrics

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then constant."""
        return self.config.peak_lr * min(1.0, (step + 1) / WARMUP_STEPS)

    def update(self, samples: Sequence[Sample], learning_rate: float) -> dict[str, Any]:
        """Take one optimizer step. Return metrics for the log."""
        rows = rows_of(samples)

        # One denominator for the whole batch, before it is cut.
        mask_BS = collate([row.segment for row in rows], self.pad).mask_BS
        owners_B = torch.tensor([row.owner for row in rows])
        max_tokens = self.config.max_new_tokens * self.config.max_turns
        total = denominator(mask_BS, self.config.aggregation, max_tokens, owners_B)
        tokens = int(mask_BS.sum())

        # Every k-th row for each worker, so that each gets short and long ones.
        count = min(len(self.workers), len(rows))
        shares = [list(microbatches(rows[i::count])) for i in range(count)]
        passes = max(len(share) for share in shares)

        def work(model: GLM, share: Sequence[Sequence[Row]] | None) -> GradientSums:
            share = share or []
            sums = self.accumulate(model, share, total, tokens)
            if self.workers.in_step:
                # A worker with fewer rows makes the passes that the others wait for, and learns nothing from them.
                for _ in range(passes - len(share)):
                    (0.0 * self.losses(model, rows[:1], total).loss).backward()
            return sums

        sums = self.workers.run(work, shares)
        added = torch.tensor([part[1:] for part in sums], dtype=torch.float64).sum(0)
        clip_share, kl, entropy = self.workers.sum(added).tolist()
        result = guarded_step(self.model, self.optimizer, learning_rate, self.clip_norm, self.guard)
        metrics = {
            "ratio_max": self.workers.largest(max(part.ratio_max for part in sums)),
            "clip_share": clip_share,
            "kl": kl,
            "entropy": entropy,
            "grad_norm": result.grad_norm,
            "left_out": result.left_out,
        }
        return metrics

    def accumulate(
        self, model: GLM, share: Sequence[Sequence[Row]], total: Tensor, tokens: int
    ) -> GradientSums:
        """Add the gradients of one worker's share of a batch, micro-batch by micro-batch.

        Args:
            model: the worker's.
            share: its micro-batches.
            total: the denominator of the whole batch.
            tokens: sampled tokens of the whole batch.
        """
        ratio_max = 0.0
        clip_share = 0.0
        kl = 0.0
        entropy = 0.0
        for microbatch in share:
            losses = self.losses(model, microbatch, total)
            losses.loss.backward()
            metrics = losses.metrics
            ratio_max = max(ratio_max, float(metrics.ratio_max))
            clip_share += float(metrics.clip_share * metrics.tokens) / tokens
            kl += float(metrics.kl * metrics.tokens) / tokens
            entropy += float(losses.entropy_sum) / tokens
        return GradientSums(ratio_max, clip_share, kl, entropy)

    def losses(self, model: GLM, microbatch: Sequence[Row], total: Tensor) -> MicrobatchLoss:
        """Return the loss of some rows, divided by the denominator of the whole batch, and its metrics."""
        device = self.model.device
        batch = collate([row.segment for row in microbatch], self.pad)
        batch = SegmentBatch(*(tensor.to(device) for tensor in batch))
        advantages_B = torch.tensor([row.advantage for row in microbatch], device=device)
        tokens_B = torch.tensor([row.tokens for row in microbatch], device=device)
        logprobs_BS, entropy_sum = sampled_log_probabilities(
            model, batch.tokens_BS, batch.mask_BS, batch.documents_BS, self.config.temperature
        )
        loss_BS, metrics = policy_loss(
            logprobs_BS,
            batch.sampling_logprobs_BS,
            advantages_B,
            self.config.clip_low,
            self.config.clip_high,
            batch.mask_BS,
        )
        loss = aggregate(loss_BS, batch.mask_BS, self.config.aggregation, total, tokens_B)
        return MicrobatchLoss(loss, metrics, entropy_sum)
