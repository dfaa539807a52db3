"""The sigmoid router with a selection bias (paper 2.1; loss-free balancing of arXiv 2408.15664).

    s = sigmoid(W x);   chosen = top-k of (s + b);   w_e = scale * s_e / sum over chosen of s

Everything is float32. The bias b decides only who is chosen; the weights come from the scores without it, or else
balancing would change what the experts say. Equal scores go to the lower expert index, so that decoding with a cache,
in any batch, takes the same experts as one full pass. With expert groups only the best `topk_group` groups compete,
a group being as good as its two best biased scores together.
"""

import torch
from torch import nn

from minglm.kernels.router import Routes, route
from minglm.kernels.router.eager import combine_weights, select_experts

__all__ = ["Router", "combine_weights", "select_experts"]


class Router(nn.Module):
    """Chooses K of E experts for each token. The bias is a buffer: no gradient moves it, but `minglm.model.balance`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer(
            "e_score_correction_bias", torch.empty(config.n_routed_experts, dtype=torch.float32)
        )

    def forward(self, x_TD: torch.Tensor) -> Routes:
        """x (T, D) to experts int64 (T, K), weights float32 (T, K), scores float32 (T, E)."""
        c = self.config
        logits_TE = x_TD.float() @ self.weight.float().T
        return route(
            logits_TE,
            self.e_score_correction_bias,
            c.num_experts_per_tok,
            c.norm_topk_prob,
            c.routed_scaling_factor,
            c.n_group,
            c.topk_group,
        )
