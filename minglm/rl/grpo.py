"""GRPO without the KL term, and its plainer form for agents (paper 3.2, 3.3).

For each prompt the policy answers G times. An answer is good when it beats its siblings, so no value network is needed:

    A_i   = (r_i - mean r) / (std r + 1e-6)               over the answers of one prompt
    rho_t = exp(log pi(y_t) - log mu(y_t))                mu: the policy that sampled, with its temperature
    loss  = -min(rho_t * A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) * A_i)    per produced token

Choices
- mu is what the rollout engine recorded while it sampled. Both sides divide the logits by the sampling temperature. On
  policy rho is exactly 1, and the gradient is REINFORCE with the group mean as baseline.
- clip_high may exceed clip_low, which lets unlikely tokens grow. The minimum is one-sided: it stops the policy from
  going *further* than the clip in the direction of the advantage, and never stops it from coming back.
- The standard deviation is the sample one (divided by G - 1). A group whose rewards are all equal carries no
  information and gets exactly zero; the division must not turn rounding into a signal.
- A sample whose episode failed for reasons of infrastructure says nothing about the policy: it leaves the statistics.
  So does one whose reward is no number: the score refuses it where the environment returns it.
- log rho is kept within 20 nats. Beyond, exp overflows float32, and the gradient of the side that the clip does not
  choose would be infinity times zero. A token so far off has no gradient, on either side.
- Truncated importance sampling is for rollouts whose probabilities differ from the trainer's for the same weights (FP8,
  another engine) or that are stale. Then rho is taken against the trainer's own probabilities pi_old, and the rest
  becomes a bounded weight: w_t = min(pi_old(y_t) / mu(y_t), cap).

The agentic objective is printed in the paper as the mean over a group of r_i - mean r, which is zero for any policy: no
probability appears in it. We read it as the advantage of the same policy gradient, without the division:
`advantages(..., normalize_std=False)`.

Paper: no KL, group-wise. Left open there and chosen here: clip range, deviation, epsilon.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EQUAL_WITHIN = 1e-6  # rewards closer than this are equal
EPSILON = 1e-6  # added to the standard deviation
MAX_LOG_RATIO = 20.0  # nats; e^20 is 4.9e8, and float32 ends at e^88


class TruncatedImportanceSampling(NamedTuple):
    """A bounded correction for rollouts that another policy, engine or precision sampled.

    Not wired yet: no stage uses it. It is what asynchronous and FP8 rollouts need (paper 3.5).
    """

    cap: float
    """Bound on the importance weight."""
    proximal_logprobs_BS: Tensor | None = None
    """Log-probabilities under the trainer's policy before the first update on this batch; None: this is the first
    update, so they are those of the policy in training."""


class PolicyMetrics(NamedTuple):
    """Detached scalars over the produced tokens."""

    ratio_max: Tensor
    """Largest rho."""
    clip_share: Tensor
    """Share of the tokens whose gradient the clip removed."""
    kl: Tensor
    """Estimate mean(rho - 1 - log rho) of KL(mu, pi), in nats."""
    tokens: Tensor
    """Number of produced tokens, the weight of the two means when micro-batches are combined."""


class PolicyLoss(NamedTuple):
    """The loss of every token and what to log of it."""

    loss_BS: Tensor
    """float32, 0 where nothing was produced."""
    metrics: PolicyMetrics


def _all_valid(rewards_PG: Tensor, valid_PG: Tensor | None) -> Tensor:
    """Return the mask, or one that is True everywhere."""
    return torch.ones_like(rewards_PG, dtype=torch.bool) if valid_PG is None else valid_PG


def _check_finite(rewards_PG: Tensor, valid_PG: Tensor) -> None:
    """Raise ValueError for a valid reward that is NaN or infinite: one would silence or poison its whole group."""
    wrong_PG = valid_PG & ~rewards_PG.isfinite()
    if wrong_PG.any():
        p, g = wrong_PG.nonzero()[0].tolist()
        raise ValueError(
            f"the reward of sample {g} of prompt {p} is {float(rewards_PG[p, g])}: it must be finite, or the sample "
            "not valid"
        )


def informative_groups(rewards_PG: Tensor, valid_PG: Tensor | None = None) -> Tensor:
    """Return which groups are live, that is teach something: bool of axis P, True where two valid rewards differ.

    Args:
        rewards_PG: float, P prompts by G samples.
        valid_PG: bool, False for infrastructure failures; None: all valid.

    Rewards are compared by their spread, not by their mean: a group in which every reward is 0.5 carries as little
    signal as one in which every reward is 0. Raises ValueError for a valid reward that is not finite.
    """
    valid_PG = _all_valid(rewards_PG, valid_PG)
    _check_finite(rewards_PG, valid_PG)
    highest_P = rewards_PG.masked_fill(~valid_PG, -torch.inf).amax(1)
    lowest_P = rewards_PG.masked_fill(~valid_PG, torch.inf).amin(1)
    return highest_P - lowest_P > EQUAL_WITHIN


def advantages(
    rewards_PG: Tensor, normalize_std: bool = True, valid_PG: Tensor | None = None
) -> Tensor:
    """Return how much better than its siblings each sample is: float32 (P, G) that sums to zero in each group.

    Args:
        rewards_PG: float, P prompts by G samples.
        normalize_std: False is the agentic form of paper 3.3.
        valid_PG: bool; samples with False leave the statistics and get 0; None: all valid.

    Raises ValueError for a valid reward that is not finite.
    """
    valid_PG = _all_valid(rewards_PG, valid_PG)
    _check_finite(rewards_PG, valid_PG)
    rewards_PG = torch.where(valid_PG, rewards_PG.float(), 0.0)
    count_P1 = valid_PG.sum(1, keepdim=True)
    # r_i - mean r
    mean_P1 = rewards_PG.sum(1, keepdim=True) / count_P1.clamp(min=1)
    advantage_PG = torch.where(valid_PG, rewards_PG - mean_P1, 0.0)
    if normalize_std:
        # / (std r + epsilon)
        squares_P1 = advantage_PG.square().sum(1, keepdim=True)
        variance_P1 = squares_P1 / (count_P1 - 1).clamp(min=1)
        advantage_PG = advantage_PG / (variance_P1.sqrt() + EPSILON)
    # Exactly zero in a group of equal rewards, whatever the rounding of its mean.
    informative_P = informative_groups(rewards_PG, valid_PG)
    return torch.where(informative_P[:, None], advantage_PG, 0.0)


def _bounded(log_ratio_BS: Tensor) -> Tensor:
    """Return log-ratios within MAX_LOG_RATIO, with no gradient beyond it."""
    return log_ratio_BS.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_loss(
    logprobs_BS: Tensor,
    sampling_logprobs_BS: Tensor,
    advantages_B: Tensor,
    clip_low: float,
    clip_high: float,
    mask_BS: Tensor | None = None,
    importance: TruncatedImportanceSampling | None = None,
) -> PolicyLoss:
    """Return the clipped surrogate loss of every token, to be aggregated.

    Args:
        logprobs_BS: float, log pi of the sampled tokens under the policy in training, with gradient, in nats.
        sampling_logprobs_BS: float, log mu of these tokens as the rollout engine recorded them.
        advantages_B: float, one number per sequence.
        clip_low: rho is clipped below at 1 - clip_low.
        clip_high: rho is clipped above at 1 + clip_high.
        mask_BS: bool, True on produced tokens; elsewhere the loss is 0 and nothing is read. None: all produced.
        importance: the correction for rollouts that are not on policy; None: no correction.
    """
    if mask_BS is None:
        mask_BS = torch.ones_like(logprobs_BS, dtype=torch.bool)
    # Masked before exp: the gradient of exp at infinity would be NaN.
    logprobs_BS = torch.where(mask_BS, logprobs_BS.float(), 0.0)
    sampling_logprobs_BS = torch.where(mask_BS, sampling_logprobs_BS.float(), 0.0)

    # The policy that rho is taken against, and the weight w_t of a token.
    old_logprobs_BS = sampling_logprobs_BS
    weight_BS = torch.ones((), device=logprobs_BS.device)
    if importance is not None:
        if importance.proximal_logprobs_BS is None:
            old_logprobs_BS = logprobs_BS.detach()
        else:
            proximal_BS = importance.proximal_logprobs_BS.float()
            old_logprobs_BS = torch.where(mask_BS, proximal_BS, 0.0)
        weight_BS = (old_logprobs_BS - sampling_logprobs_BS).exp().clamp(max=importance.cap)

    advantages_B1 = advantages_B.float()[:, None]
    ratio_BS = _bounded(logprobs_BS - old_logprobs_BS).exp()  # rho_t
    unclipped_BS = ratio_BS * advantages_B1
    clipped_BS = ratio_BS.clamp(1 - clip_low, 1 + clip_high) * advantages_B1
    surrogate_BS = -torch.minimum(unclipped_BS, clipped_BS) * weight_BS
    loss_BS = torch.where(mask_BS, surrogate_BS, 0.0)

    with torch.no_grad():
        tokens = mask_BS.sum()
        log_rho_BS = _bounded(logprobs_BS - sampling_logprobs_BS)  # 0 where the mask is False
        kl_BS = torch.expm1(log_rho_BS) - log_rho_BS
        metrics = PolicyMetrics(
            ratio_max=torch.where(mask_BS, log_rho_BS.exp(), 0.0).amax(),
            clip_share=(clipped_BS < unclipped_BS).sum() / tokens.clamp(min=1),
            kl=kl_BS.sum() / tokens.clamp(min=1),
            tokens=tokens,
        )
    return PolicyLoss(loss_BS, metrics)
