"""The router's choice in one pass, and the pairs (token, expert) sorted by expert (paper 2.1).

    s = sigmoid(logits);   chosen = top-k of (s + b), ties to the lower index;   w_e = scale * s_e / sum of chosen s

`router_topk` is the plain form: what `minglm.model.router` does for one group of experts, from the logits on. Written
out, PyTorch sorts all E scores of each token to keep K of them, in half a dozen kernels that move (T, E) each; the
Triton kernel reads the logits once and picks K times the largest that is left. With Z the sum over the chosen,

    dw -> ds_e = scale / Z * (dw_e - sum_i dw_i s_i / Z)  for the chosen e;   dlogit = ds * s * (1 - s)

`group_by_expert` is the plain form of the sort: a stable one, so that an expert's rows keep the order of their tokens
and every sum the same order on every run. The Triton form counts: how many pairs of each block of pairs go to each
expert, running sums over those, and then each pair knows its place. No number comes back to the host, so the host never
waits for the router; a tile of a grouped product finds its expert from `ends` (`minglm.kernels.experts.eager`).
"""

import torch

from minglm.kernels.dispatch import backend


def router_topk(logits_TE, bias_E, top_k, normalize=True, scale=1.0):
    """Plain form: experts int64 (T, K), best first; weights (T, K); scores (T, E), both in the logits' dtype.

    logits (T, E); bias (E,), which decides who is chosen and has no gradient. Differentiable in the logits through the
    weights and the scores.
    """
    scores_TE = logits_TE.sigmoid()
    with torch.no_grad():
        experts_TK = (
            (scores_TE + bias_E).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        )
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20)
    return experts_TK, weights_TK * scale, scores_TE


def sort_by_expert(experts_TK, experts):
    """`group_by_expert` in the form that `minglm.kernels.dispatch` chooses."""
    if backend(experts_TK) == "triton":
        from minglm.kernels.router.triton_kernel import group_by_expert_triton

        return group_by_expert_triton(experts_TK, experts)
    return group_by_expert(experts_TK, experts)


def group_by_expert(experts_TK, experts, multiple=1):
    """Plain form: (order, inverse, ends) of the T * K pairs, sorted by expert, in order of tokens within each.

    order int64 (rows,): row i of the sorted pairs is pair order[i], of token order[i] // K. inverse (T * K,): pair p is
    row inverse[p]. ends int32 (E,): expert e has rows ends[e - 1] to ends[e]. The rows of each expert are filled up to
    a multiple of `multiple`; such a row names pair 0, and no pair names it.
    """
    flat = experts_TK.reshape(-1)
    pairs = torch.arange(len(flat), device=flat.device)
    counts_E = torch.bincount(flat, minlength=experts)
    room_E = -(counts_E // -multiple) * multiple
    ends_E = room_E.cumsum(0)
    order = flat.argsort(stable=True)
    moved_E = (ends_E - room_E) - (counts_E.cumsum(0) - counts_E)
    row = torch.empty_like(order).scatter_(0, order, pairs + moved_E[flat[order]])
    rows = (
        len(flat) if multiple == 1 else int(ends_E[-1])
    )  # reading a number back would make a GPU wait
    return order.new_zeros(rows).scatter_(0, row, pairs), row, ends_E.to(torch.int32)
