"""The sigmoid router with a selection bias (paper 2.1; loss-free balancing of arXiv 2408.15664).

    s = sigmoid(W x);   chosen = top-k of (s + b);   w_e = scale * s_e / sum over chosen of s

Everything is float32, also in a model of another dtype: the steps of the bias are smaller than what bfloat16
can tell apart, so that rounding it would give many experts the same bias. The bias b only decides which
experts are selected. The weights come from the scores without it, or balancing would change the output. Equal
scores go to the lower expert index, so that decoding with a cache, in any batch, takes the same experts as
one full pass. With expert groups only the best `topk_group` groups compete; a group is as good as the sum of
its two best biased scores.

Reinforcement learning may impose the experts that the rollout engine chose (routing replay, arXiv
2510.11370). Then the choice is the engine's and the rest is as ever: the weights come from this router's own
scores at the imposed experts, so they and the scores keep their gradient.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from minglm.config import ModelConfig
from minglm.kernels.router import Routes, route
from minglm.kernels.router.eager import combine_weights, select_experts

__all__ = ["Router", "combine_weights", "select_experts"]


class Router(nn.Module):
    """Selects K of E experts for each token.

    The selection bias is a buffer: no gradient moves it, only `minglm.model.balance.update_expert_bias`.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias_E = torch.empty(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias_E)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert as every module does (`.to`, `.bfloat16`, ...); the selection bias is moved only."""
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        converted_E = self.e_score_correction_bias
        if converted_E.dtype != torch.float32:
            self.e_score_correction_bias = bias_E.to(converted_E.device, torch.float32)
        return self

    def forward(self, x_TD: Tensor) -> Routes:
        """Map x (T, D) to experts int64 (T, K), weights float32 (T, K) and scores float32 (T, E)."""
        # s = sigmoid(W x) and what follows is one operation on the logits W x.
        logits_TE = x_TD.float() @ self.weight.float().T
        return route(
            logits_TE,
            self.e_score_correction_bias,
            self.config.num_experts_per_tok,
            normalize=self.config.norm_topk_prob,
            scale=self.config.routed_scaling_factor,
            groups=self.config.n_group,
            top_groups=self.config.topk_group,
        )

    def impose(self, routes: Routes, imposed_TK: Tensor) -> Routes:
        """Return the routes with other experts, and the weights that this router's scores give those.

        imposed int (T, K): the experts of each token, best first; -1 in a row leaves the token's own choice.
        """
        own_T1 = (imposed_TK < 0).any(1, keepdim=True)
        experts_TK = torch.where(own_T1, routes.experts_TK, imposed_TK.long())
        weights_TK = combine_weights(
            routes.scores_TE,
            experts_TK,
            self.config.norm_topk_prob,
            self.config.routed_scaling_factor,
        )
        return Routes(experts_TK, weights_TK, routes.scores_TE)


def replaced_choices(own_TK: Tensor, imposed_TK: Tensor) -> Tensor:
    """Count the imposed experts that are not among a router's own choice for the token: int64, a scalar.

    own int64 and imposed int (T, K); rows of imposed with -1 count nothing.
    """
    found_TK = (imposed_TK[:, :, None] == own_TK[:, None, :]).any(2)
    return (~found_TK & (imposed_TK >= 0)).sum()
