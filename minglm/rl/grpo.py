"""GRPO without the KL term (paper 3.2), and its plainer form for agents (3.3).

For each prompt the policy answers G times; an answer is good when it beats its siblings, so no value network is needed:

    A_i   = (r_i - mean r) / (std r + 1e-6)               over the answers of one prompt
    rho_t = exp(log pi(y_t) - log mu(y_t))                mu: the policy that sampled, with its temperature
    loss  = -min(rho_t * A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) * A_i)    per produced token

Choices
- mu is what the rollout engine recorded while it sampled. Both sides divide the logits by the sampling temperature. On
  policy rho is exactly 1, and the gradient is REINFORCE with the group mean as baseline.
- clip_high may exceed clip_low, which lets unlikely tokens grow. The minimum is one-sided: it stops the policy from
  going *further* than the clip in the direction the advantage asks for, and never stops it from coming back.
- The standard deviation is the sample one (divided by G - 1). A group whose rewards are all equal carries no
  information and gets exactly zero; rounding is not allowed to become a signal through the division.
- A sample whose episode failed for reasons of infrastructure says nothing about the policy: it leaves the statistics.
- Truncated importance sampling (`tis_cap`) is for rollouts whose probabilities differ from the trainer's for the same
  weights (FP8, another engine) or that are stale. Then rho is taken against the trainer's own probabilities and the
  rest becomes a bounded weight: w_t = min(pi_old(y_t) / mu(y_t), cap).

The agentic objective is printed in the paper as the mean over a group of r_i - mean r, which is zero for any policy: no
probability appears in it. We read it as the advantage of the same policy gradient, without the division:
`advantages(..., normalize_std=False)`.

Paper: no KL, group-wise. Left open there and chosen here: clip range, deviation, epsilon.
"""

import torch

SPREAD = 1e-6  # rewards closer than this are equal


def _valid(rewards_PG, valid_PG):
    return torch.ones_like(rewards_PG, dtype=torch.bool) if valid_PG is None else valid_PG


def live_groups(rewards_PG, valid_PG=None):
    """Which groups teach something: bool tensor of axis P, True where two valid rewards differ.

    rewards_PG: float. valid_PG: bool, False for infrastructure failures; None: all valid.
    Compare by spread, not by mean: a group of equal half marks is as mute as a group of zeros.
    """
    valid_PG = _valid(rewards_PG, valid_PG)
    highest_P = rewards_PG.masked_fill(~valid_PG, -torch.inf).amax(1)
    lowest_P = rewards_PG.masked_fill(~valid_PG, torch.inf).amin(1)
    return highest_P - lowest_P > SPREAD


def advantages(rewards_PG, normalize_std=True, valid_PG=None):
    """How much better than its siblings each sample is: float32 tensor of axes P, G that sums to zero in each group.

    rewards_PG: float, P prompts by G samples. normalize_std: False is the agentic form of paper 3.3.
    valid_PG: bool, False samples leave the statistics and get 0; None: all valid.
    """
    valid_PG = _valid(rewards_PG, valid_PG)
    rewards_PG = torch.where(valid_PG, rewards_PG.float(), 0.0)
    count_P1 = valid_PG.sum(1, keepdim=True)
    mean_P1 = rewards_PG.sum(1, keepdim=True) / count_P1.clamp(min=1)
    centred_PG = torch.where(valid_PG, rewards_PG - mean_P1, 0.0)
    if normalize_std:
        variance_P1 = centred_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)
        centred_PG = centred_PG / (variance_P1.sqrt() + 1e-6)
    return torch.where(live_groups(rewards_PG, valid_PG)[:, None], centred_PG, 0.0)


def policy_loss(
    logprobs_BS,
    behaviour_BS,
    advantages_B,
    clip_low,
    clip_high,
    mask_BS=None,
    tis_cap=None,
    proximal_BS=None,
):
    """Clipped surrogate loss of every token, to be aggregated.

    logprobs_BS: log-probabilities of the sampled tokens under the policy in training, with gradient, in nats.
    behaviour_BS: the same tokens' log-probabilities recorded by the rollout. advantages_B: one number a sequence.
    mask_BS: bool, True on produced tokens; elsewhere the loss is 0 and nothing is read. None: all produced.
    tis_cap: bound on the importance weight, or None for no truncated importance sampling.
    proximal_BS: with tis_cap, the trainer's log-probabilities before the first update on this batch; None: this is the
    first update, so they are logprobs_BS themselves.
    Returns loss_BS float32 and metrics, detached scalars over the produced tokens: `ratio_max`; `clip_share`, tokens
    whose gradient the clip removed; `kl`, the estimate mean(rho - 1 - log rho) of KL(mu, pi), in nats; `tokens`, their
    number, by which the two means of micro-batches are to be weighed.
    """
    mask_BS = torch.ones_like(logprobs_BS, dtype=torch.bool) if mask_BS is None else mask_BS
    logprobs_BS = torch.where(
        mask_BS, logprobs_BS.float(), 0.0
    )  # before exp: its gradient at inf would be NaN
    behaviour_BS = torch.where(mask_BS, behaviour_BS.float(), 0.0)
    old_BS, weight_BS = behaviour_BS, 1.0
    if tis_cap is not None:
        old_BS = (
            logprobs_BS.detach()
            if proximal_BS is None
            else torch.where(mask_BS, proximal_BS.float(), 0.0)
        )
        weight_BS = (old_BS - behaviour_BS).exp().clamp(max=tis_cap)

    advantages_B1 = advantages_B.float()[:, None]
    ratio_BS = (logprobs_BS - old_BS).exp()
    free_BS = ratio_BS * advantages_B1
    clipped_BS = ratio_BS.clamp(1 - clip_low, 1 + clip_high) * advantages_B1
    loss_BS = torch.where(mask_BS, -torch.minimum(free_BS, clipped_BS) * weight_BS, 0.0)

    with torch.no_grad():
        tokens, log_rho_BS = mask_BS.sum(), logprobs_BS - behaviour_BS  # 0 where the mask is False
        metrics = {
            "ratio_max": torch.where(mask_BS, log_rho_BS.exp(), 0.0).amax(),
            "clip_share": (clipped_BS < free_BS).sum() / tokens.clamp(min=1),
            "kl": (torch.expm1(log_rho_BS) - log_rho_BS).sum() / tokens.clamp(min=1),
            "tokens": tokens,
        }
    return loss_BS, metrics
