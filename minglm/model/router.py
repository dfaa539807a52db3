"""The sigmoid router with a selection bias (paper 2.1; loss-free balancing of arXiv 2408.15664).

    s = sigmoid(W x);   chosen = top-k of (s + b);   w_e = scale * s_e / sum over chosen of s

Everything is float32. The bias b decides only who is chosen; the weights come from the scores without it, or else
balancing would change what the experts say. Equal scores go to the lower expert index, so that decoding with a cache,
in any batch, takes the same experts as one full pass. With expert groups only the best `topk_group` groups compete,
a group being as good as its two best biased scores together.
"""

import torch
from torch import nn

from minglm.kernels.dispatch import backend


def select_experts(scores_TE, bias_E, top_k, groups=1, top_groups=1):
    """The K experts of each token: int64 (T, K), best first, ties to the lower index. scores, bias float32."""
    biased_TE = scores_TE + bias_E
    if groups > 1:
        grouped = biased_TE.unflatten(1, (groups, -1))
        strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = strength.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
        out = torch.ones_like(strength, dtype=torch.bool).scatter_(1, best, False)
        biased_TE = grouped.masked_fill(out[..., None], float("-inf")).flatten(1)
    return biased_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def combine_weights(scores_TE, experts_TK, normalize=True, scale=1.0):
    """The weights (T, K) float32 of the chosen experts, from the unbiased scores; differentiable in the scores."""
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20)
    return weights_TK * scale


class Router(nn.Module):
    """Chooses K of E experts for each token. The bias is a buffer: no gradient moves it, but `minglm.model.balance`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer(
            "e_score_correction_bias", torch.empty(config.n_routed_experts, dtype=torch.float32)
        )

    def forward(self, x_TD):
        """x (T, D) to experts int64 (T, K), weights float32 (T, K), scores float32 (T, E)."""
        c = self.config
        logits_TE = x_TD.float() @ self.weight.float().T
        if c.n_group == 1 and backend(logits_TE) == "triton":
            from minglm.kernels.router.triton_kernel import route_triton

            options = (
                self.e_score_correction_bias,
                c.num_experts_per_tok,
                c.norm_topk_prob,
                c.routed_scaling_factor,
            )
            return route_triton(logits_TE, *options)
        scores_TE = logits_TE.sigmoid()
        with torch.no_grad():
            experts_TK = select_experts(
                scores_TE,
                self.e_score_correction_bias,
                c.num_experts_per_tok,
                c.n_group,
                c.topk_group,
            )
        return (
            experts_TK,
            combine_weights(scores_TE, experts_TK, c.norm_topk_prob, c.routed_scaling_factor),
            scores_TE,
        )
