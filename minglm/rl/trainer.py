"""Train on rewarded groups: advantages, policy gradient, optimizer step (paper 3.2, 3.3).

    groups -> rewards -> advantages within each group -> loss per token -> one number -> gradient -> step

Groups whose samples all got the same reward carry no signal and are left out before any gradient is computed. With
fewer than two informative groups the step is skipped, because an optimizer that normalises would turn noise into a
full-size step. The gradient is computed in micro-batches of similar length, with one denominator counted over the
whole batch. A trajectory is one sample, however many segments it has: they share its advantage, its vote and its
update.

With `updates_per_rollout` the samples of a rollout are divided into as many batches, each with answers to every prompt,
and each is one update. From the second on the policy is no longer the one that sampled. With an importance cap the
trainer's own log-probabilities are therefore recorded for these batches before the first update.

A KL term needs the weights that the stage began with, which `reference` holds. The MTP layer and the balance of the experts
are left alone unless the stage asks for them (`minglm.rl.auxiliary`). A gradient that is not finite, or that is a spike
(`train.guard`), is not used, and the log says so.

Routing replay (`routing_replay`; arXiv 2510.11370): an expert that differs between rollout and training changes a token
more than all rounding does. So the engine returns its choices, and the trainer imposes them on its routers, also in later
updates of the same rollout. The weights of the imposed experts still come from the trainer's own scores. The last token of
a text has none, because the engine ends before it reads it; nothing is predicted from there. The reference of a KL term
chooses its own experts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minglm.config import BalanceConfig, OptimizerConfig, RLConfig
from minglm.inference.scoring import Scorer, Text
from minglm.model.balance import update_expert_bias
from minglm.model.glm import GLM
from minglm.parallel import Replicas, Workers
from minglm.rewards.hybrid import Grader
from minglm.rewards.shaping import shaped_reward
from minglm.rl.aggregation import aggregate, denominator
from minglm.rl.auxiliary import (
    AuxiliaryTerms,
    auxiliary_terms,
    auxiliary_weights,
    count_mtp_targets,
)
from minglm.rl.batch import (
    Row,
    Sample,
    SampledLogProbabilities,
    SegmentBatch,
    by_prompt,
    collate,
    microbatches,
    padded,
    rows_of,
    sampled_log_probabilities,
    share_prompts,
    sharing_microbatches,
)
from minglm.rl.episode import Trajectory
from minglm.rl.exact import with_values
from minglm.rl.gap import measure_gap
from minglm.rl.grpo import advantages, informative_groups
from minglm.rl.losses import PolicyMetrics, policy_loss
from minglm.rl.temperature import TemperatureController
from minglm.train.guard import Guard, guarded_step
from minglm.train.state import TrainingState

MICROBATCH_TOKENS = 8192
CPU_MICROBATCH_TOKENS = 2048
"""On a CPU: the activations of a layer then stay in its cache, and an update of the toy takes 15% less time."""

WARMUP_STEPS = 5
MIN_INFORMATIVE_GROUPS = 2


class Comparison(NamedTuple):
    """The rewards of P groups of G samples."""

    rewards_PG: Tensor
    """float32, with the penalty for faults; not to be read where `valid_PG` is False."""
    valid_PG: Tensor
    """bool, False where the environment failed."""
    informative_P: Tensor
    """bool, whether rewards of the group differ."""


class Choices(NamedTuple):
    """Choices of routers, of a token on a layer."""

    imposed: int
    replaced: int
    """Those of them that the trainer's routers would not have made."""


class MicrobatchLoss(NamedTuple):
    """The loss of a micro-batch, and its metrics."""

    loss: Tensor
    """A scalar, on which `backward()` is called."""
    metrics: PolicyMetrics
    entropy_sum: Tensor
    """Scalar: sum over the sampled tokens, nats."""
    log_ratios_T: Tensor
    """float32, log pi - log mu of the sampled tokens, detached."""
    choices: Choices
    auxiliary: AuxiliaryTerms


class Denominators(NamedTuple):
    """What the losses of a batch are divided by, counted before it is cut."""

    policy: Tensor
    """That of `aggregate`."""
    mtp_targets: int
    """Positions that the MTP layer learns from."""
    rows: int


class WorkerMetrics(NamedTuple):
    """Metrics of the micro-batches of one worker; the sums are already divided by the tokens of the whole batch."""

    ratio_max: float
    means: list[float]
    """The worker's part of the means over the batch: clip_share, kl, capped_share, reference_kl, entropy, mtp_loss."""
    log_ratios_T: Tensor
    """float32, of the worker's sampled tokens."""
    choices: Choices
    tokens_per_expert_LE: Tensor
    """float32, of the routers of the trunk; zeros where nobody asks."""


def reward(trajectory: Trajectory, fault_penalty: float) -> float:
    """Return the score of a trajectory, less the penalty if its last turn has a fault or it disobeys the switch."""
    flags = trajectory.faults() if fault_penalty else {}
    return shaped_reward(trajectory.score.value, flags, trajectory.switch_obeyed, fault_penalty)


def divide(
    rows: Sequence[Row], workers: Workers, device: torch.device, sharing: bool = False
) -> tuple[list[list[list[Row]]], int]:
    """Return the micro-batches of each worker, and how many the busiest has.

    device: where they are computed. sharing: rows with one prompt stay together, if there is a prompt for each worker.
    """
    count = min(len(workers), len(rows))
    most_tokens = MICROBATCH_TOKENS
    if device.type == "cpu":
        most_tokens = min(most_tokens, CPU_MICROBATCH_TOKENS)
    most_tokens *= workers.row_part.ranks
    # Every k-th row or prompt for each worker, so that each gets short and long ones.
    if sharing:
        groups = by_prompt(rows)
        if len(groups) < count:
            groups = [[row] for row in rows]
        shares = [list(sharing_microbatches(groups[i::count], most_tokens)) for i in range(count)]
    else:
        shares = [list(microbatches(rows[i::count], most_tokens)) for i in range(count)]
    return shares, max(len(share) for share in shares)


class PolicyTrainer:
    """The policy, its optimizer and its guard: makes updates of rewarded groups.

    Args:
        model: the policy.
        optimizer: its optimizer.
        config: settings of the RL stage.
        optimizer_config: bound on the gradient norm, and which steps are skipped; the learning rate is the stage's.
        pad: id of the padding token.
        workers: threads or ranks that share the samples of an update; None: the model alone.
        reference: the policy at the beginning of the stage, which a KL term is measured from; None: there is no such
            term.
        scorer: gives log-probabilities their exact values (`minglm.rl.exact`); None: those of the training pass.
        balance: weight and rate of the balance where the stage asks for it; None: those of the paper.
    """

    def __init__(
        self,
        model: GLM,
        optimizer: torch.optim.Optimizer,
        config: RLConfig,
        optimizer_config: OptimizerConfig,
        pad: int,
        workers: Workers | None = None,
        reference: GLM | None = None,
        scorer: Scorer | None = None,
        balance: BalanceConfig | None = None,
    ) -> None:
        assert (reference is not None) == bool(config.loss.beta), (
            "a reference, if there is a KL term"
        )
        self.model = model
        self.reference = reference
        self.optimizer = optimizer
        self.config = config
        self.clip_norm = optimizer_config.clip_norm
        self.pad = pad
        self.workers = workers or Replicas(model)
        self.scorer = scorer
        self.keep_logprobs = False
        """Whether segments get the trainer's log-probabilities, for who writes samples."""
        self.grader: Grader | None = None
        """Gives the rewards of rollouts; None: they are the scores of the environments."""
        self.auxiliary = auxiliary_weights(config, balance or BalanceConfig(), model)
        self.guard = Guard(optimizer_config.spike_factor, optimizer_config.rollback_after)
        self.temperature = TemperatureController(config.temperature, config.dynamic_temperature)
        parts = {"temperature": self.temperature}
        self.state = TrainingState(model, optimizer, self.guard, parts=parts)

    def compare(self, groups: Sequence[Sequence[Trajectory]]) -> Comparison:
        """Return the rewards of groups, and which groups they say something of."""
        penalty = self.config.fault_penalty
        rewards_PG = torch.tensor(
            [[reward(t, penalty) for t in group] for group in groups], dtype=torch.float32
        )
        valid_PG = torch.tensor([[t.valid for t in group] for group in groups])
        return Comparison(rewards_PG, valid_PG, informative_groups(rewards_PG, valid_PG))

    def informative(self, groups: Sequence[Sequence[Trajectory]]) -> list[bool]:
        """Return for each group whether its rewards teach anything."""
        return self.compare(groups).informative_P.tolist()

    def learn(self, groups: Sequence[Sequence[Trajectory]], step: int) -> dict[str, Any]:
        """Turn rewarded groups into optimizer steps, `updates_per_rollout` of them. Return metrics for the log.

        step: number of the step from 0, for the warm-up. The metrics are fields of `RLRecord`.
        """
        rewards_PG, valid_PG, informative_P = self.compare(groups)
        advantage_PG = advantages(rewards_PG, self.config.normalize_std, valid_PG)
        live = int(informative_P.sum())

        metrics: dict[str, Any] = {
            "groups": len(groups),
            "discarded": len(groups) - live,
            "live_groups": round(live / len(groups), 4),
            "skipped": live < MIN_INFORMATIVE_GROUPS,
        }
        if metrics["skipped"]:
            return metrics

        samples = []
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group):
                if informative_P[p] and valid_PG[p, g]:
                    trajectory.advantage = float(advantage_PG[p, g])
                    samples.append(Sample(trajectory.segments, trajectory.advantage, p))
        segments = [segment for sample in samples for segment in sample.segments]
        metrics["segment_tokens"] = sum(len(segment.tokens) for segment in segments)
        metrics["trained_tokens"] = sum(sum(segment.mask) for segment in segments)

        # Each update gets every k-th trajectory of the rollout; the log shows the last one.
        updates = min(self.config.updates_per_rollout, len(samples))
        batches = [samples[first::updates] for first in range(updates)]
        if self.config.loss.importance_cap:
            for batch in batches[1:]:
                self.record_proximal(batch)
        reasons = []
        keep_logprobs = self.keep_logprobs
        for number, batch in enumerate(batches):
            self.keep_logprobs = keep_logprobs and number == 0  # later the policy has moved
            found = self.update(batch, self.learning_rate(step))
            gap = found.pop("gap")._asdict()
            gap["routing"] = found.pop("gap_routing")
            if not reasons:  # later updates see a policy that has moved
                metrics |= {f"gap_{name}": value for name, value in gap.items()}
            metrics |= found
            reasons.append(metrics["left_out"])
        self.keep_logprobs = keep_logprobs
        metrics["skipped"] = all(reasons)
        metrics["left_out"] = next(filter(None, reasons), None)
        return metrics

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then constant."""
        return self.config.peak_lr * min(1.0, (step + 1) / WARMUP_STEPS)

    def record_proximal(self, samples: Sequence[Sample]) -> None:
        """Give the segments of an update the log-probabilities under the present policy."""
        shares, passes = self.divide(self.rows_of(samples))

        @torch.no_grad()
        def work(model: GLM, share: Sequence[Sequence[Row]] | None) -> None:
            share = share or []
            for microbatch in share:
                batch = self.batch_of(microbatch)
                logprobs_BS = self.log_probabilities(model, batch).logprobs_BS
                before = [0.0] * batch.begin
                for row, logprobs_S in zip(microbatch, logprobs_BS.tolist(), strict=True):
                    whole = before + logprobs_S
                    row.segment.proximal_logprobs = whole[: len(row.segment.tokens)]
                    if self.keep_logprobs and batch.positions_BS is None:  # whole rows
                        row.segment.trainer_logprobs = row.segment.proximal_logprobs
            if self.workers.in_step:
                # The ranks meet in every forward pass.
                for _ in range(passes - len(share)):
                    self.log_probabilities(model, self.batch_of(shares[0][0]))

        # The update divides the same rows in the same way, so every worker finds what it recorded.
        self.workers.run(work, shares)

    @property
    def shares_prompts(self) -> bool:
        """Whether the answers to a prompt pass through the model with one copy of it."""
        balances = self.auxiliary.balance or self.auxiliary.bias_rate
        return self.workers.row_part.ranks == 1 and not balances

    def divide(self, rows: Sequence[Row]) -> tuple[list[list[list[Row]]], int]:
        """Return the micro-batches of each worker, and how many the busiest has."""
        return divide(rows, self.workers, self.model.device, self.shares_prompts)

    def rows_of(self, samples: Sequence[Sample]) -> list[Row]:
        """Return the segments of samples as `rows_of` does, with exact log-probabilities where there is a scorer."""
        rows = rows_of(samples, self.config.loss.aggregation)
        if self.scorer is None:
            return rows
        texts = [Text(row.segment.tokens, row.segment.mask) for row in rows]
        exact = self.scorer.log_probabilities(texts, self.temperature.value)
        return [row._replace(exact_T=exact_T) for row, exact_T in zip(rows, exact, strict=True)]

    def update(self, samples: Sequence[Sample], learning_rate: float) -> dict[str, Any]:
        """Take one optimizer step. Return metrics for the log, and under "gap" the `Gap` before the step."""
        loss_config = self.config.loss
        rows = self.rows_of(samples)

        # One denominator for the whole batch, before it is cut.
        mask_BS = padded([row.segment.mask for row in rows], False, torch.bool)
        owners_B = torch.tensor([row.owner for row in rows])
        max_tokens = self.config.max_new_tokens * self.config.max_turns
        total = Denominators(
            denominator(mask_BS, loss_config.aggregation, max_tokens, owners_B),
            count_mtp_targets(mask_BS) if self.auxiliary.mtp else 0,
            len(rows),
        )
        tokens = int(mask_BS.sum())
        shares, passes = self.divide(rows)

        def work(model: GLM, share: Sequence[Sequence[Row]] | None) -> WorkerMetrics:
            share = share or []
            sums = self.accumulate(model, share, total, tokens)
            if self.workers.in_step:
                # A worker with fewer rows makes the passes that the others wait for, and learns nothing from them.
                for _ in range(passes - len(share)):
                    (0.0 * self.losses(model, rows[:1], total).loss).backward()
            return sums

        sums = self.workers.run(work, shares)
        added = torch.tensor([part.means for part in sums], dtype=torch.float64).sum(0)
        means = self.workers.sum(added).tolist()
        clip_share, kl, capped_share, reference_kl, entropy, mtp = means
        gap = measure_gap(torch.cat([part.log_ratios_T for part in sums]), self.workers)
        counts = torch.tensor([part.choices for part in sums]).sum(0)
        imposed, replaced = self.workers.sum(counts).tolist()
        load_LE = self.workers.sum(torch.stack([s.tokens_per_expert_LE for s in sums]).sum(0))
        result = guarded_step(
            self.model,
            self.optimizer,
            learning_rate,
            self.clip_norm,
            self.guard,
            apart=self.model.mtp if self.auxiliary.mtp else None,
        )
        if self.auxiliary.bias_rate and result.left_out is None:
            self.step_bias(load_LE)
        metrics = {
            "ratio_max": self.workers.largest(max(part.ratio_max for part in sums)),
            "clip_share": clip_share,
            "kl": kl,
            "capped_share": capped_share if loss_config.importance_cap else None,
            "reference_kl": reference_kl if loss_config.beta else None,
            "entropy": entropy,
            "mtp_loss": mtp if self.auxiliary.mtp else None,
            "grad_norm": result.grad_norm,
            "left_out": result.left_out,
            "gap": gap,
            "gap_routing": replaced / imposed if imposed else None,
        }
        return metrics

    def step_bias(self, load_LE: Tensor) -> None:
        """Step the selection bias of the trunk's routers; load float32 (L, E), tokens of the whole batch."""
        for load_E, router in zip(
            load_LE, self.model.routers(), strict=False
        ):  # without the MTP layer's
            bias_E = router.e_score_correction_bias
            update_expert_bias(bias_E, load_E.to(bias_E.device), self.auxiliary.bias_rate)

    def accumulate(
        self, model: GLM, share: Sequence[Sequence[Row]], total: Denominators, tokens: int
    ) -> WorkerMetrics:
        """Add the gradients of one worker's share of a batch, micro-batch by micro-batch.

        Args:
            model: the worker's.
            share: its micro-batches.
            total: the denominators of the whole batch.
            tokens: sampled tokens of the whole batch.
        """
        ratio_max = 0.0
        means = torch.zeros(6, dtype=torch.float64)
        log_ratios = [torch.zeros(0, device=self.model.device)]
        imposed = 0
        replaced = 0
        config = model.config
        layers = config.num_hidden_layers - config.first_k_dense_replace
        load_LE = torch.zeros(layers, config.n_routed_experts)
        for microbatch in share:
            losses = self.losses(model, microbatch, total)
            losses.loss.backward()
            metrics = losses.metrics
            ratio_max = max(ratio_max, float(metrics.ratio_max))
            shares = (metrics.clip_share, metrics.kl, metrics.capped_share, metrics.reference_kl)
            added = [*(share * metrics.tokens for share in shares), losses.entropy_sum]
            means[:5] += torch.stack(added).detach().cpu().double() / tokens
            means[5] += losses.auxiliary.mtp
            if losses.auxiliary.tokens_per_expert_LE is not None:
                load_LE += losses.auxiliary.tokens_per_expert_LE.cpu()
            log_ratios.append(losses.log_ratios_T)
            imposed += losses.choices.imposed
            replaced += losses.choices.replaced
        choices = Choices(imposed, replaced)
        log_ratios_T = torch.cat(log_ratios)
        return WorkerMetrics(ratio_max, means.tolist(), log_ratios_T, choices, load_LE)

    def batch_of(self, microbatch: Sequence[Row]) -> SegmentBatch:
        """Return the segments of some rows as tensors on the model's device: the positions that this process computes."""
        part = self.workers.row_part
        batch = collate([row.segment for row in microbatch], self.pad, part.ranks)
        exact = [row.exact_T for row in microbatch if row.exact_T is not None]
        if exact:
            values_BS = torch.zeros_like(batch.sampling_logprobs_BS)
            values_BS = values_BS.masked_scatter(batch.mask_BS, torch.cat(exact))
            batch = batch._replace(exact_BS=values_BS)
        if self.shares_prompts:
            batch = share_prompts(batch, [row.segment for row in microbatch])
        return batch.cut(part).to(self.model.device)

    def log_probabilities(self, model: GLM, batch: SegmentBatch) -> SampledLogProbabilities:
        """Return what a model says of a batch, at the temperature of the rollout."""
        found = sampled_log_probabilities(model, batch, self.temperature.value)
        if batch.exact_BS is None:
            return found
        values_BS = torch.where(batch.predicted_BS, batch.exact_BS, 0.0)
        return found._replace(logprobs_BS=with_values(found.logprobs_BS, values_BS))

    def losses(self, model: GLM, microbatch: Sequence[Row], total: Denominators) -> MicrobatchLoss:
        """Return the loss of some rows, divided by the denominators of the whole batch, and its metrics."""
        device = self.model.device
        batch = self.batch_of(microbatch)
        advantages_B = torch.tensor([row.advantage for row in microbatch], device=device)
        tokens_B = torch.tensor([row.tokens for row in microbatch], device=device)
        logprobs_BS, entropy_sum, out = self.log_probabilities(model, batch)
        choices = Choices(0, 0)
        imposed_BSLK = batch.passing_BSLK
        if imposed_BSLK is not None:
            replaced = sum(int(r.replaced) for r in out.routing if r.replaced is not None)
            choices = Choices(int((imposed_BSLK >= 0).sum()), replaced)
        predicted_BS = batch.predicted_BS
        proximal_BS = None
        if all(row.segment.proximal_logprobs for row in microbatch):
            proximal_BS = batch.proximal_logprobs_BS
        reference_BS = None
        if self.reference is not None:
            with torch.no_grad():
                its_own = batch._replace(imposed_BSLK=None, exact_BS=None)
                reference_BS = self.log_probabilities(self.reference, its_own).logprobs_BS
        loss_BS, metrics = policy_loss(
            logprobs_BS,
            batch.sampling_logprobs_BS,
            advantages_B,
            self.config.loss,
            predicted_BS,
            proximal_BS,
            reference_BS,
        )
        aggregation = self.config.loss.aggregation
        loss = aggregate(loss_BS, predicted_BS, aggregation, total.policy, tokens_B)
        auxiliary = auxiliary_terms(
            model, out, batch, self.auxiliary, total.mtp_targets, total.rows
        )
        if self.keep_logprobs and batch.positions_BS is None:  # whole rows
            for row, logprobs_S in zip(microbatch, logprobs_BS.tolist(), strict=True):
                if row.segment.trainer_logprobs is None:
                    row.segment.trainer_logprobs = logprobs_S[: len(row.segment.tokens)]
        log_ratios_BS = logprobs_BS.detach() - batch.sampling_logprobs_BS
        log_ratios_T = log_ratios_BS[predicted_BS]
        loss = loss + auxiliary.loss
        return MicrobatchLoss(loss, metrics, entropy_sum, log_ratios_T, choices, auxiliary)
