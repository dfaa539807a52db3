"""Weigh sampled tokens by their advantage: the policy losses, GRPO without KL among them (paper 3.2, 3.3).

For a token y_t of an answer with advantage A (`minglm.rl.grpo`), with pi the policy in training, pi_old the
one that the ratio is taken against, mu the one that sampled, and pi_ref the weights at the beginning of the
stage:

    rho_t = pi(y_t) / pi_old(y_t)                         importance_sampling_level = token
    rho_t = (prod over the segment of rho_t)^(1 / |y|)    sequence: one number for all tokens of a segment

    clip    loss_t = -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)
            with delta, where A < 0:    loss_t = min(that, -delta A)
    cispo   loss_t = -sg[clip(rho_t, 1 - clip_low, 1 + clip_high)] A log pi(y_t)          sg: no gradient

    loss_t  w_t loss_t + beta (pi_ref / pi - 1 - log(pi_ref / pi))
    w_t     min(pi_old(y_t) / mu(y_t), importance_cap), with pi_old the trainer's own; 1, with pi_old = mu, without a cap

The losses of the literature are settings (`PolicyLossConfig`, beside `RLConfig.normalize_std` and `RLConfig.refill`):

    GRPO, the paper's       the defaults; for code aggregation = token
    GRPO, first published   beta = 0.04, clip_high = 0.2, aggregation = sequence
    Dr. GRPO                aggregation = constant, normalize_std = False
    DAPO                    clip_high = 0.28, aggregation = token, refill > 0
    GSPO                    importance_sampling_level = sequence, clip_low = 3e-4, clip_high = 4e-4, aggregation = sequence
    CISPO                   loss_type = cispo, clip_low = 1 (none below), aggregation = token

Choices
- mu is what the rollout engine recorded while it sampled. Both sides divide the logits by the sampling temperature. On
  policy rho is exactly 1, and the gradient is REINFORCE with the group mean as baseline.
- clip_high may exceed clip_low, which lets unlikely tokens grow. The minimum is one-sided: it stops the policy from
  going *further* than the clip in the direction of the advantage, and never stops it from coming back. On that open
  side a token with a negative advantage has an unbounded ratio; `delta` (dual clip, two-sided clip) bounds it.
- Truncated importance sampling is for rollouts whose probabilities differ from the trainer's for the same weights (FP8,
  another engine) or that are stale. The clip then counts from the trainer's own policy before the first update on the
  rollout, so that it measures what the updates did, and not what the engine did.
- The sequence of a ratio is a segment, because that is what one prompt conditions; the votes of a trajectory are the
  aggregation's concern. GSPO's token variant, whose value is that of the sequence and whose gradient passes through
  the token alone, has the same gradient where an answer has one advantage and no weights w, so it is no setting.
- log rho is kept within 20 nats. Beyond, exp overflows float32, and the gradient of the side that the clip does not
  choose would be infinity times zero. A token so far off has no gradient, on either side.

Paper: no KL, so beta = 0 and no reference is held. Left open there and chosen here: the clip range.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minglm.config.posttraining import LossType, PolicyLossConfig, RatioLevel

MAX_LOG_RATIO = 20.0  # nats; e^20 is 4.9e8, and float32 ends at e^88


class PolicyMetrics(NamedTuple):
    """Detached scalars over the produced tokens."""

    ratio_max: Tensor
    """Largest pi / mu."""
    clip_share: Tensor
    """Share of the tokens whose gradient the clip removed, or whose weight it changed (cispo)."""
    kl: Tensor
    """Estimate mean(r - 1 - log r), r = pi / mu, of KL(mu, pi), in nats."""
    capped_share: Tensor
    """Share of the tokens whose importance weight reached the cap; 0 without one."""
    reference_kl: Tensor
    """Mean of the KL term before `beta`, in nats; 0 without a reference."""
    tokens: Tensor
    """Number of produced tokens, the weight of the means when micro-batches are combined."""


class PolicyLoss(NamedTuple):
    """The loss of every token and what to log of it."""

    loss_BS: Tensor
    """float32, 0 where nothing was produced."""
    metrics: PolicyMetrics


def _bounded(log_ratio_BS: Tensor) -> Tensor:
    """Return log-ratios within MAX_LOG_RATIO, with no gradient beyond it."""
    return log_ratio_BS.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _log_ratio(log_ratio_BS: Tensor, mask_BS: Tensor, level: RatioLevel) -> Tensor:
    """Return log rho of every token: its own, or the mean over the produced tokens of its row."""
    if level == RatioLevel.TOKEN:
        return _bounded(log_ratio_BS)
    tokens_B1 = mask_BS.sum(1, keepdim=True).clamp(min=1)
    mean_B1 = log_ratio_BS.sum(1, keepdim=True) / tokens_B1  # 0 where the mask is False
    return _bounded(mean_B1).expand_as(log_ratio_BS)


class _Surrogate(NamedTuple):
    """The loss of every token before its weight, and where the clip decided it."""

    loss_BS: Tensor
    clipped_BS: Tensor
    """bool."""


def _clip(ratio_BS: Tensor, advantages_B1: Tensor, config: PolicyLossConfig) -> _Surrogate:
    """Return the clipped surrogate."""
    bounded_BS = ratio_BS
    if config.delta:
        # Above 1 + clip_high, so that it binds only where the advantage is negative.
        bounded_BS = ratio_BS.clamp(max=config.delta)
    unclipped_BS = bounded_BS * advantages_B1
    clipped_BS = ratio_BS.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages_B1
    stopped_BS = clipped_BS < unclipped_BS
    if config.delta:
        stopped_BS = stopped_BS | ((ratio_BS > config.delta) & (advantages_B1 < 0))
    return _Surrogate(-torch.minimum(unclipped_BS, clipped_BS), stopped_BS)


def _cispo(
    ratio_BS: Tensor, logprobs_BS: Tensor, advantages_B1: Tensor, config: PolicyLossConfig
) -> _Surrogate:
    """Return the log-probability, weighted by the advantage and the clipped ratio."""
    weight_BS = ratio_BS.detach().clamp(1 - config.clip_low, 1 + config.clip_high)
    return _Surrogate(-weight_BS * advantages_B1 * logprobs_BS, weight_BS != ratio_BS.detach())


def policy_loss(
    logprobs_BS: Tensor,
    sampling_logprobs_BS: Tensor,
    advantages_B: Tensor,
    config: PolicyLossConfig,
    mask_BS: Tensor | None = None,
    proximal_logprobs_BS: Tensor | None = None,
    reference_logprobs_BS: Tensor | None = None,
) -> PolicyLoss:
    """Return the loss of every token, to be aggregated. Every row is a segment.

    Args:
        logprobs_BS: float, log pi of the sampled tokens under the policy in training, with gradient, in nats.
        sampling_logprobs_BS: float, log mu of these tokens as the rollout engine recorded them.
        advantages_B: float, one number per segment.
        config: which loss, and its bounds.
        mask_BS: bool, True on produced tokens; elsewhere the loss is 0 and nothing is read. None: all produced.
        proximal_logprobs_BS: float, the trainer's before the first update on this rollout, read with an importance
            cap. None: this is that update, so they are `logprobs_BS`.
        reference_logprobs_BS: float, those of the weights at the beginning of the stage, read where beta is not 0.
    """
    if mask_BS is None:
        mask_BS = torch.ones_like(logprobs_BS, dtype=torch.bool)

    def produced(values_BS: Tensor) -> Tensor:
        # Masked before exp: the gradient of exp at infinity would be NaN.
        return torch.where(mask_BS, values_BS.float(), 0.0)

    logprobs_BS = produced(logprobs_BS)
    sampling_logprobs_BS = produced(sampling_logprobs_BS)
    advantages_B1 = advantages_B.float()[:, None]

    # The policy that rho is taken against, and the weight w_t of a token.
    old_logprobs_BS = sampling_logprobs_BS
    weight_BS = torch.ones_like(sampling_logprobs_BS)
    capped_BS = torch.zeros_like(mask_BS)
    if config.importance_cap:
        old_logprobs_BS = logprobs_BS.detach()
        if proximal_logprobs_BS is not None:
            old_logprobs_BS = produced(proximal_logprobs_BS)
        correction_BS = _bounded(old_logprobs_BS - sampling_logprobs_BS).exp()
        weight_BS = correction_BS.clamp(max=config.importance_cap)
        capped_BS = mask_BS & (correction_BS > config.importance_cap)

    level = config.importance_sampling_level
    ratio_BS = _log_ratio(logprobs_BS - old_logprobs_BS, mask_BS, level).exp()
    if config.loss_type == LossType.CISPO:
        surrogate_BS, clipped_BS = _cispo(ratio_BS, logprobs_BS, advantages_B1, config)
    else:
        surrogate_BS, clipped_BS = _clip(ratio_BS, advantages_B1, config)
    loss_BS = surrogate_BS * weight_BS

    divergence_BS = torch.zeros_like(sampling_logprobs_BS)
    if config.beta:
        assert reference_logprobs_BS is not None, (
            "a KL term needs the reference's log-probabilities"
        )
        log_ratio_BS = _bounded(produced(reference_logprobs_BS) - logprobs_BS)
        divergence_BS = torch.expm1(log_ratio_BS) - log_ratio_BS
        loss_BS = loss_BS + config.beta * divergence_BS
    loss_BS = torch.where(mask_BS, loss_BS, 0.0)

    with torch.no_grad():
        tokens = mask_BS.sum()

        def mean(values_BS: Tensor) -> Tensor:
            return torch.where(mask_BS, values_BS, 0).sum() / tokens.clamp(min=1)

        log_rho_BS = _bounded(logprobs_BS - sampling_logprobs_BS)
        metrics = PolicyMetrics(
            ratio_max=torch.where(mask_BS, log_rho_BS.exp(), 0.0).amax(),
            clip_share=mean(clipped_BS),
            kl=mean(torch.expm1(log_rho_BS) - log_rho_BS),
            capped_share=mean(capped_BS),
            reference_kl=mean(divergence_BS),
            tokens=tokens,
        )
    return PolicyLoss(loss_BS, metrics)
