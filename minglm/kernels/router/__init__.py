"""The router's choice in one pass, and the sort of its pairs by expert: the functions that the model calls (paper 2.1).

Written out, PyTorch sorts all E scores of each token to keep K of them, in half a dozen kernels that move (T, E) each;
the Triton kernel reads the logits once and picks K times the largest that is left. With Z the sum over the chosen,

    dw -> ds_e = scale / Z * (dw_e - sum_i dw_i s_i / Z)  for the chosen e;   dlogit = ds * s * (1 - s)

The Triton form of the sort counts: how many pairs of each block of pairs go to each expert, running sums over those,
and then each pair knows its place. No number comes back to the host, so the host never waits for the router; a tile of
a grouped product finds its expert from `ends`. `eager.py` has the references. `minglm.kernels.dispatch` chooses.
"""

import torch

from minglm.kernels.dispatch import Operation, select
from minglm.kernels.router.eager import Routes, SortedPairs

__all__ = ["Routes", "SortedPairs", "route", "sort_by_expert"]


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor,
    top_k: int,
    normalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
) -> Routes:
    """Choose `top_k` experts for each token: experts int64 (T, K), weights (T, K) and scores (T, E) in float32.

    logits (T, E) and bias (E,), float32. The bias decides who is chosen and has no gradient. Differentiable in the
    logits through the weights and the scores.
    """
    compute = select(Operation.ROUTER, logits_TE, expert_groups=groups)
    grouping = () if groups == 1 else (groups, top_groups)
    return Routes(*compute(logits_TE, bias_E, top_k, normalize, scale, *grouping))


def sort_by_expert(experts_TK: torch.Tensor, experts: int) -> SortedPairs:
    """Sort the pairs of int64 experts (T, K) by expert, in order of tokens within each."""
    return SortedPairs(*select(Operation.SORT_BY_EXPERT, experts_TK)(experts_TK, experts))
