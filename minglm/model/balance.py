"""Balance the load of the experts: a selection bias without a loss, and a small loss per sequence (paper 2.4).

    bias:      b_e <- b_e + rate * sign(mean load - load_e), once per optimizer step
    sequence:  loss = alpha * E * sum_e f_e P_e,   f_e = share of the sequence's choices that fell on e,
               P_e = mean over the sequence of s_e / sum_e' s_e'

The loads are those of the whole batch: summed over micro-batches and ranks, before one step of the bias. The
forward pass returns them and does not count them itself, so recomputing activations cannot count a token
twice. alpha is 1e-4 in the paper: the loss only prevents extremes within one sequence. At perfect balance it
equals alpha. Where ranks share a row, each adds its positions to the counts of the row (`sum_over_row`). As
f_e is a constant and P_e a sum over positions, the losses of the ranks then add up to that of the row, and so
do their gradients. The paper gives a rate and no centring of the step; some systems subtract the step's mean,
which changes no choice.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

SumOverRow = Callable[[Tensor], Tensor]
"""Adds up counts, float32 (B, ...), over all ranks that hold positions of the same rows."""


def whole_row(counts: Tensor) -> Tensor:
    """Return the counts of rows whose positions are all in this process: as they are."""
    return counts


def tokens_per_expert(
    experts_TK: Tensor, num_experts: int, valid_T: Tensor | None = None
) -> Tensor:
    """Count the tokens routed to each expert: float32 (E,). Tokens where valid is False do not count."""
    chosen = experts_TK if valid_T is None else experts_TK[valid_T]
    return torch.bincount(chosen.reshape(-1), minlength=num_experts).float()


def sequence_loss(
    scores_TE: Tensor,
    experts_TK: Tensor,
    batch: int,
    valid_T: Tensor | None = None,
    sum_over_row: SumOverRow = whole_row,
) -> Tensor:
    """Compute the balance loss without its weight alpha: a scalar, averaged over `batch` sequences of equal length.

    scores float32 (T, E); experts int64 (T, K); valid bool (T,): tokens where it is False do not count.
    sum_over_row: adds the counts of other ranks, where they hold the rest of each row; the result is this rank's part.
    """
    E = scores_TE.shape[1]
    K = experts_TK.shape[1]
    if valid_T is None:
        valid_T1 = torch.ones_like(scores_TE[:, :1])
    else:
        valid_T1 = valid_T[:, None].float()

    # Of each row: how often each expert was chosen, and the tokens. Constants.
    with torch.no_grad():
        chosen_TE = torch.zeros_like(scores_TE).scatter_(1, experts_TK, 1.0) * valid_T1
        chosen_BE = rearrange(chosen_TE, "(b s) e -> b s e", b=batch).sum(1)
        tokens_B1 = rearrange(valid_T1, "(b s) 1 -> b s 1", b=batch).sum(1)
        counts = sum_over_row(torch.cat([chosen_BE, tokens_B1], 1))
        chosen_BE, tokens_B1 = counts[:, :E], counts[:, E:].clamp(min=1)

    # P_e: the mean share of expert e in the scores of a token. This factor carries the gradient.
    share_TE = scores_TE / (scores_TE.sum(1, keepdim=True) + 1e-20) * valid_T1
    P_BE = rearrange(share_TE, "(b s) e -> b s e", b=batch).sum(1) / tokens_B1

    # f_e: the share of the sequence's choices that fell on expert e.
    f_BE = chosen_BE / (tokens_B1 * K)
    return E * (f_BE * P_BE).sum(1).mean()


@torch.no_grad()
def update_expert_bias(bias_E: Tensor, tokens_per_expert_E: Tensor, rate: float) -> None:
    """Move the selection bias in place: up for experts below the mean load, down for those above it."""
    bias_E += rate * torch.sign(tokens_per_expert_E.mean() - tokens_per_expert_E)
