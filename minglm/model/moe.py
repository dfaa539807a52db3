"""The mixture-of-experts layer: router, routed experts, and one shared expert for every token (paper 2.1).

    y = sum over chosen e of w_e * expert_e(x)  +  shared(x);     expert_e(x) = down_e( silu(gate_e x) * (up_e x) )

The shared expert is neither gated nor scaled. The experts are three stacks of matrices, so that one grouped
product serves them all and an optimizer sees each expert's matrix as a slice.

Three objects have one concern each, and each can be replaced without a change to this file:

    Router              chooses: which experts, with which weights
    MoE.dispatcher      moves: brings tokens to the experts and sums up what they return; `LocalDispatcher` for experts in
                        this process, `minglm.parallel.dispatcher` where ranks divide them. It calls the shared expert,
                        which needs no token of another rank, while tokens travel
    Experts             computes; its attribute `operation` is the kernel, in place of which generation in float8 puts
                        its own

`Experts.forward` takes rows, each for one expert, as they arrive from other ranks. Where all experts are
local, sorting, products and weighted sum are one kernel operation, which need not keep the experts' output
for the backward pass: `LocalDispatcher` calls that (`Experts.weighted_sum`). Both compute the same:
`minglm.testing.model.check_dispatcher`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from minglm.config import ModelConfig
from minglm.kernels.experts import grouped_experts
from minglm.model.balance import SumOverRow, sequence_loss, tokens_per_expert, whole_row
from minglm.model.layers import MLP
from minglm.model.router import Router, replaced_choices


@dataclass
class Routing:
    """The report of one MoE layer about a forward pass.

    Loads and loss are computed when someone asks for them.
    """

    experts_TK: Tensor
    """int64: the experts of each token, best first."""
    scores_TE: Tensor
    """float32: what the router thinks of all experts, before the selection bias."""
    batch: int
    """Sequences of equal length that the tokens belong to."""
    valid_T: Tensor | None
    """bool: the tokens that count; None: all."""
    sum_over_row: SumOverRow
    """Adds the counts of other ranks, where they hold the rest of each row."""
    replaced: Tensor | None = None
    """Choices of the router that an imposed choice replaced, int64, a scalar; None where nothing was imposed."""

    @cached_property
    def tokens_per_expert_E(self) -> Tensor:
        """Tokens routed to each expert, float32 (E,)."""
        return tokens_per_expert(self.experts_TK, self.scores_TE.shape[1], self.valid_T)

    @cached_property
    def balance_loss(self) -> Tensor:
        """The sequence-wise balance loss without its weight, a scalar."""
        return sequence_loss(
            self.scores_TE, self.experts_TK, self.batch, self.valid_T, self.sum_over_row
        )


class ExpertsOperation(Protocol):
    """A kernel operation like `minglm.kernels.experts.eager.grouped_experts`: weighted sums over chosen experts."""

    def __call__(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        /,
    ) -> Tensor: ...


class Experts(nn.Module):
    """The routed experts: gate and up (E, F, D), down (E, D, F), and the operation that applies them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E = config.n_routed_experts
        D = config.hidden_size
        F = config.moe_intermediate_size
        self.gate_EFD = nn.Parameter(torch.empty(E, F, D))
        self.up_EFD = nn.Parameter(torch.empty(E, F, D))
        self.down_EDF = nn.Parameter(torch.empty(E, D, F))
        self.operation: ExpertsOperation = grouped_experts

    def forward(self, x_RD: Tensor, expert_R: Tensor) -> Tensor:
        """Apply to each row its expert: rows as they arrive from other ranks, in any order.

        x (R, D); expert int64 (R,). Returns (R, D) in x's dtype, not weighted.
        """
        # A row is a token with one chosen expert of weight one, so the operation for tokens serves rows too.
        ones_R1 = torch.ones(len(x_RD), 1, dtype=torch.float32, device=x_RD.device)
        return self.weighted_sum(x_RD, rearrange(expert_R, "r -> r 1"), ones_R1)

    def weighted_sum(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Compute sum over k of weight_tk * expert_tk(x_t), for tokens in any order.

        x (T, D); experts int64 (T, K); weights float32 (T, K). Returns (T, D) in x's dtype.
        """
        return self.operation(
            x_TD, experts_TK, weights_TK, self.gate_EFD, self.up_EFD, self.down_EDF
        )


class Dispatcher(Protocol):
    """Bring tokens to their experts and return each token's weighted sum of what they compute."""

    def __call__(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        experts: Experts,
        shared: nn.Module | None = None,
        /,
    ) -> Tensor:
        """x (T, D); experts int64 (T, K); weights float32 (T, K); returns (T, D) in x's dtype, differentiable.

        shared: the shared expert, whose result is added; None: there is none.
        """
        ...


class LocalDispatcher:
    """The dispatcher for experts that are all in this process: no token moves."""

    def __call__(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        experts: Experts,
        shared: nn.Module | None = None,
    ) -> Tensor:
        """Compute each token's weighted sum over its experts; shapes as in `Dispatcher`."""
        y_TD = experts.weighted_sum(x_TD, experts_TK, weights_TK)
        return y_TD if shared is None else y_TD + shared(x_TD)


class MoE(nn.Module):
    """Drop-in for a layer's MLP; reports its routing beside its result."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            shared_width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = MLP(config.hidden_size, shared_width)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.sum_over_row: SumOverRow = whole_row

    def forward(
        self,
        x_BSD: Tensor,
        valid_BS: Tensor | None = None,
        imposed_BSK: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Map x (B, S, D) to (y (B, S, D), Routing).

        Positions where valid is False are computed but not counted in the routing. imposed int (B, S, K):
        experts to take in place of the router's own choice, see `Router.impose`.
        """
        B, S, _ = x_BSD.shape
        x_TD = rearrange(x_BSD, "b s d -> (b s) d")
        routes = self.gate(x_TD)
        replaced = None
        if imposed_BSK is not None:
            imposed_TK = rearrange(imposed_BSK, "b s k -> (b s) k")
            replaced = replaced_choices(routes.experts_TK, imposed_TK)
            routes = self.gate.impose(routes, imposed_TK)
        experts_TK, weights_TK, scores_TE = routes
        y_TD = self.dispatcher(x_TD, experts_TK, weights_TK, self.experts, self.shared_experts)
        y_BSD = rearrange(y_TD, "(b s) d -> b s d", b=B, s=S)
        valid_T = None if valid_BS is None else valid_BS.reshape(-1)
        return y_BSD, Routing(experts_TK, scores_TE, B, valid_T, self.sum_over_row, replaced)
