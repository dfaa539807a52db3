"""Exchange tokens between the ranks that divide the experts by DeepEP's kernels: the extra dispatcher (paper 3.5; DeepSeek-V3).

    layout  ->  dispatch: a token once to each rank that has one of its experts, with the choices and weights for them
            ->  each rank's experts, and the weighted sum over those of the token that are here
            ->  combine: the sum of what the ranks of a token send back

    backward:  that of dispatch is combine, that of combine is dispatch along the same way

`minglm.parallel.dispatcher` sends a token K times, once for each choice; this sends it once to each rank, so
with 8 choices among 8 ranks about 5.3 times (`minglm.plan.speed.rows_of_a_token`), and the kernels write
straight into the receiver's
memory: over NVLink inside a node, over RDMA between nodes. It replaces that dispatcher and nothing else
(`--parallel.dispatcher deepep`).

The calls were read from DeepEP 1.2.1 (github.com/deepseek-ai/DeepEP: `deep_ep/buffer.py`, `csrc/deep_ep.cpp`,
the example of training in `docs/legacy.md`); version 2 keeps the same `Buffer` for older programs. They were
**never run on GPUs**: tests hold them to a stand-in for the package, which checks every argument and
exchanges through torch.distributed.

What it needs, and who refuses what is missing, in one line:
- bfloat16, rows of a multiple of 256 numbers, as many ranks as there are settings for: the config (`minglm.config.run`);
- the package, GPUs of compute capability 8.0 and up, NVLink between those of a node, RDMA cards beyond eight ranks: a run,
  before it starts (`minglm.recipe.preflight`).

Choices:
- The weights travel with the tokens, in float32, and are applied where the experts are, also in float32: only sums leave the
  rank, rounded to bfloat16 once more than in one process.
- The shared expert computes while tokens travel, after the host has learned how many come: so it waits once in each layer, as
  with all-to-alls.
- All layers share one buffer, and so one dispatcher. Its size depends on the ranks and the width, not on the tokens.
"""

import importlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minglm.model.moe import Experts

BYTES = 2  # of a number that travels: bfloat16


class Arrival(NamedTuple):
    """What arrived at a rank: tokens, and their choices among its experts. T are the tokens that arrived."""

    x_TD: Tensor
    expert_TK: Tensor
    """int64: an expert, numbered among those of this rank; -1: this choice is on another rank."""
    weights_TK: Tensor
    """float32: 0 where the choice is on another rank."""
    rows: int
    """Choices that are on this rank: the sum of the tokens of its experts."""
    handle: Any
    """DeepEP's notes of the way, for the way back."""
    event: Any
    """To wait for before the tensors are read."""


class DeepEPDispatcher:
    """The dispatcher for experts that the ranks of a group divide, in the order of the ranks, by DeepEP's kernels.

    experts: how many there are in all, a multiple of the ranks. hidden_size: of the tokens, at most. Every
    rank of the group must make one. Raises ImportError without the package.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int, hidden_size: int) -> None:
        # Named here and nowhere else: it is no dependency, and exists on machines with GPUs only.
        package = importlib.import_module("deep_ep")
        ranks = dist.get_world_size(group)
        settings = (
            package.Buffer.get_dispatch_config(ranks),
            package.Buffer.get_combine_config(ranks),
        )
        row = BYTES * hidden_size
        nvlink = max(config.get_nvl_buffer_size_hint(row, ranks) for config in settings)
        rdma = max(config.get_rdma_buffer_size_hint(row, ranks) for config in settings)
        self.buffer = package.Buffer(group, nvlink, rdma)
        self.index_dtype: torch.dtype = package.topk_idx_t
        self.experts = experts

    def __call__(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        experts: Experts,
        shared: nn.Module | None = None,
    ) -> Tensor:
        """Compute each token's weighted sum over its experts, wherever they are; shapes as in `Dispatcher`."""
        arrival = self.dispatch(x_TD, experts_TK, weights_TK)
        shared_TD = None if shared is None else shared(x_TD)  # while the tokens travel
        arrival.event.current_stream_wait()

        sums_TD = local_sums(arrival, experts)
        y_TD = Combine.apply(sums_TD, self.buffer, arrival.handle)
        return y_TD if shared_TD is None else y_TD + shared_TD

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Arrival:
        """Send each token to the ranks of its experts. What arrives may be read after its event."""
        chosen_TK = experts_TK.to(self.index_dtype).contiguous()
        weights_TK = weights_TK.float().contiguous()
        arrived = Dispatch.apply(
            x_TD.contiguous(), chosen_TK, weights_TK, self.buffer, self.experts
        )
        return Arrival(*arrived)


def local_sums(arrival: Arrival, experts: Experts) -> Tensor:
    """Return, for each token that arrived, sum over k of w_k * expert_k(x) over the experts of this rank: (T, D)."""
    # The number of rows is known, so no GPU is asked for it.
    here = torch.nonzero_static(arrival.expert_TK >= 0, size=arrival.rows)
    token_R, choice_R = here.unbind(1)
    rows_RD = arrival.x_TD.index_select(0, token_R)
    computed_RD = experts(rows_RD, arrival.expert_TK[token_R, choice_R].long())
    weighted_RD = computed_RD.float() * arrival.weights_TK[token_R, choice_R, None]
    sums_TD = torch.zeros_like(arrival.x_TD, dtype=torch.float32).index_add(0, token_R, weighted_RD)
    return sums_TD.to(arrival.x_TD.dtype)


class Dispatch(torch.autograd.Function):
    """Send tokens to the ranks of their experts; the gradients come back by a combine."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, buffer: Any, experts: int
    ) -> tuple[Any, ...]:
        """Return the fields of an `Arrival`. experts: how many there are in all."""
        per_rank, per_rdma_rank, per_expert, is_token_in_rank, _ = buffer.get_dispatch_layout(
            experts_TK, experts
        )
        *arrived, rows_of_expert, handle, event = buffer.dispatch(
            x_TD,
            topk_idx=experts_TK,
            topk_weights=weights_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        ctx.buffer = buffer
        ctx.handle = handle
        ctx.mark_non_differentiable(arrived[1])
        return *arrived, sum(rows_of_expert), handle, event

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Sum the gradients of a token and of its weights over the ranks where it was."""
        there_TD, _, there_TK = gradients[:3]
        grad_TD, grad_TK, _ = ctx.buffer.combine(
            there_TD.contiguous(), ctx.handle, topk_weights=there_TK.float().contiguous()
        )
        return grad_TD, None, grad_TK, None, None


class Combine(torch.autograd.Function):
    """Sum what the ranks of each token computed; the gradients go to them by a dispatch along the same way."""

    @staticmethod
    def forward(ctx: Any, sums_TD: Tensor, buffer: Any, handle: Any) -> Tensor:
        """Return the sums of this rank's tokens (T, D)."""
        ctx.buffer = buffer
        ctx.handle = handle
        y_TD, _, _ = buffer.combine(sums_TD.contiguous(), handle)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Give each rank of a token the gradient of its sum."""
        there_TD = ctx.buffer.dispatch(gradients[0].contiguous(), handle=ctx.handle)[0]
        return there_TD, None, None
