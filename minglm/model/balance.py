"""Keeping the experts busy: the selection bias that needs no loss, and a slight loss per sequence (paper 2.4).

    bias:      b_e <- b_e + rate * sign(mean load - load_e), once per optimizer step
    sequence:  loss = alpha * E * sum_e f_e P_e,   f_e = share of the sequence's choices that fell on e,
               P_e = mean over the sequence of s_e / sum_e' s_e'

The loads are those of the whole batch: summed over micro-batches and ranks, before one step of the bias. They are
returned by the forward pass rather than counted inside it, so recomputing activations cannot count a token twice.
alpha is 1e-4 in the paper: the loss only prevents extremes within one sequence. At perfect balance it equals alpha.
The paper gives a rate and no centring of the step; some systems subtract the step's mean, which changes no choice.
"""

import torch


def load(experts_TK, num_experts, valid_T=None):
    """How many of the choices fell on each expert: float32 (E,). Tokens where valid is False do not count."""
    chosen = experts_TK if valid_T is None else experts_TK[valid_T]
    return torch.bincount(chosen.reshape(-1), minlength=num_experts).float()


def sequence_loss(scores_TE, experts_TK, batch, valid_T=None):
    """The balance loss without its weight alpha: a scalar, averaged over `batch` sequences of equal length."""
    T, E = scores_TE.shape
    valid_T1 = torch.ones_like(scores_TE[:, :1]) if valid_T is None else valid_T[:, None].float()
    share_TE = scores_TE / (scores_TE.sum(1, keepdim=True) + 1e-20) * valid_T1
    tokens_B1 = valid_T1.view(batch, -1).sum(1, keepdim=True).clamp(min=1)
    mean_BE = share_TE.view(batch, -1, E).sum(1) / tokens_B1
    with torch.no_grad():
        chosen_TE = torch.zeros_like(scores_TE).scatter_(1, experts_TK, 1.0) * valid_T1
        often_BE = chosen_TE.view(batch, -1, E).sum(1) / (tokens_B1 * experts_TK.shape[1])
    return E * (often_BE * mean_BE).sum(1).mean()


@torch.no_grad()
def update_expert_bias(bias_E, load_E, rate):
    """Move the bias in place: up for experts with less than the mean load, down for those with more."""
    bias_E += rate * torch.sign(load_E.mean() - load_E)
