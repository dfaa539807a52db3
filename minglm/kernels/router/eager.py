"""The router's choice and the sort by expert, in plain PyTorch: the references (paper 2.1).

    s = sigmoid(logits);   chosen = top-k of (s + b), ties to the lower index;   w_e = scale * s_e / sum of chosen s

With expert groups only the best `top_groups` groups compete, a group being as good as its two best biased scores
together. The sort is a stable one, so that an expert's rows keep the order of their tokens and every sum has the same
order on every run.
"""

from typing import NamedTuple

import torch


class Routes(NamedTuple):
    """The experts of each token, the weight of each, and the scores of all."""

    experts_TK: torch.Tensor
    """int64, best first."""
    weights_TK: torch.Tensor
    scores_TE: torch.Tensor
    """Before the bias."""


class SortedPairs(NamedTuple):
    """The T * K pairs (token, expert), sorted by expert, in order of tokens within each."""

    order: torch.Tensor
    """int64 (rows,): row i is pair order[i], of token order[i] // K."""
    inverse: torch.Tensor
    """int64 (T * K,): pair p is row inverse[p]."""
    ends_E: torch.Tensor
    """int32 (E,): expert e has rows ends[e - 1] to ends[e]."""


def select_experts(
    scores_TE: torch.Tensor,
    bias_E: torch.Tensor,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
) -> torch.Tensor:
    """Return the K experts of each token, int64 (T, K), best first, ties to the lower index.

    scores (T, E) and bias (E,), which decides only who is chosen, in one float dtype.
    """
    biased_TE = scores_TE + bias_E
    if groups > 1:
        grouped = biased_TE.unflatten(1, (groups, -1))
        strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = strength.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
        out = torch.ones_like(strength, dtype=torch.bool).scatter_(1, best, False)
        biased_TE = grouped.masked_fill(out[..., None], float("-inf")).flatten(1)
    return biased_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def combine_weights(
    scores_TE: torch.Tensor, experts_TK: torch.Tensor, normalize: bool = True, scale: float = 1.0
) -> torch.Tensor:
    """Return the weights (T, K) of the chosen experts, from the scores (T, E) without bias; differentiable in them."""
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20)
    return weights_TK * scale


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor,
    top_k: int,
    normalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
) -> Routes:
    """Choose `top_k` experts for each token from the logits (T, E); weights and scores have the logits' dtype.

    bias (E,) has no gradient. Differentiable in the logits through the weights and the scores.
    """
    scores_TE = logits_TE.sigmoid()
    with torch.no_grad():
        experts_TK = select_experts(scores_TE, bias_E, top_k, groups, top_groups)
    weights_TK = combine_weights(scores_TE, experts_TK, normalize, scale)
    return Routes(experts_TK, weights_TK, scores_TE)


def group_by_expert(experts_TK: torch.Tensor, experts: int, multiple: int = 1) -> SortedPairs:
    """Sort the pairs of int64 experts (T, K) by expert.

    The rows of each expert are filled up to a multiple of `multiple`; such a row names pair 0, and no pair names it.
    """
    flat = experts_TK.reshape(-1)
    pairs = torch.arange(len(flat), device=flat.device)
    counts_E = torch.bincount(flat, minlength=experts)
    room_E = -(counts_E // -multiple) * multiple
    ends_E = room_E.cumsum(0)
    order = flat.argsort(stable=True)

    # How far the padding before an expert moves its rows.
    moved_E = (ends_E - room_E) - (counts_E.cumsum(0) - counts_E)
    row = torch.empty_like(order).scatter_(0, order, pairs + moved_E[flat[order]])

    # Reading the number of rows back would make a GPU wait; without padding it is known.
    rows = len(flat) if multiple == 1 else int(ends_E[-1])
    padded_order = order.new_zeros(rows).scatter_(0, row, pairs)
    return SortedPairs(padded_order, row, ends_E.to(torch.int32))
