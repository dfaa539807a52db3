"""The mixture-of-experts layer: router, routed experts, and one shared expert that every token visits (paper 2.1).

    y = sum over chosen e of w_e * expert_e(x)  +  shared(x)

The shared expert is neither gated nor scaled. The experts are three stacks, so that one grouped product serves them all
and an optimizer sees each expert's matrix as a slice. `dispatch` is a plain attribute with the signature of
`grouped_experts`; expert parallelism puts its exchange of tokens there, generation in float8 its products, and this
file stays as it is.
"""

from dataclasses import dataclass

import torch
from torch import nn

from minglm.kernels.experts.eager import grouped_experts
from minglm.model import balance
from minglm.model.layers import MLP
from minglm.model.router import Router


@dataclass
class Routing:
    """What one MoE layer reports of a forward pass: tokens_per_expert float32 (E,) and the unweighted balance loss, a scalar."""

    tokens_per_expert_E: torch.Tensor
    balance_loss: torch.Tensor


class Experts(nn.Module):
    """The routed experts' matrices: gate, up (E, F, D) and down (E, D, F)."""

    def __init__(self, config):
        super().__init__()
        E, D, F = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_EFD = nn.Parameter(torch.empty(E, F, D))
        self.up_EFD = nn.Parameter(torch.empty(E, F, D))
        self.down_EDF = nn.Parameter(torch.empty(E, D, F))


class MoE(nn.Module):
    """Drop-in for a layer's MLP; reports its routing beside its result."""

    def __init__(self, config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = (
            MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )
        self.dispatch = grouped_experts

    def forward(self, x_BSD, valid_BS=None):
        """x (B, S, D) to (y (B, S, D), Routing). Positions where valid is False are computed but not counted."""
        B, S, D = x_BSD.shape
        x_TD, e = x_BSD.reshape(B * S, D), self.experts
        experts_TK, weights_TK, scores_TE = self.gate(x_TD)
        y_TD = self.dispatch(x_TD, experts_TK, weights_TK, e.gate_EFD, e.up_EFD, e.down_EDF)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        if not torch.is_grad_enabled():  # generation has no use for the report
            return y_TD.view(B, S, D), None
        valid_T = None if valid_BS is None else valid_BS.reshape(-1)
        routing = Routing(
            balance.tokens_per_expert(experts_TK, e.gate_EFD.shape[0], valid_T),
            balance.sequence_loss(scores_TE, experts_TK, B, valid_T),
        )
        return y_TD.view(B, S, D), routing
