"""Exchange tokens between the ranks that divide the experts: expert parallelism (paper 2.1; no section of its own).

    rows sorted by expert  ->  all-to-all  ->  each rank's experts  ->  all-to-all back  ->  weighted sum of a token's rows
                                    shared expert, meanwhile

Each rank holds E / ranks consecutive experts. A token with K experts travels as up to K rows, to any ranks;
how many rows come from where is exchanged first, since the receiver must know it. The weights of the sum stay
at home.

Choices:
- Rows are sent in the order of their experts and computed in the order of arrival: the experts' operation sorts indices
  itself, so no row is moved twice.
- A rank whose experts get no token takes part all the same, with zero rows: the collectives of all ranks are equal.
- The shared expert needs no other rank, so it computes while the rows travel.
- `force_balanced` sends the same number of rows everywhere, whatever the router says. Sizes then follow from shapes, which a
  planner needs that runs a step without numbers; benchmarks that use it say so.

Simplified: the sizes are read back by the host, so a GPU waits for it once in each layer, and a token travels
once for each choice, also to one rank. `minglm.parallel.deepep` sends it to a rank once, by kernels that
write into the receiver's memory.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from minglm.model.moe import Experts


class Journey(NamedTuple):
    """Where the rows of this rank go, and what arrives here."""

    pair_R: Tensor
    """int64: the (token, choice) pair of each row that leaves, in the order of sending."""
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    expert_R: Tensor
    """int64: the expert of each row that arrives, numbered among those of this rank."""


class AllToAllDispatcher:
    """The dispatcher for experts that the ranks of a group divide, in the order of the ranks.

    experts: how many there are in all, a multiple of the ranks. force_balanced: see the module's docstring.
    """

    def __init__(
        self, group: dist.ProcessGroup, experts: int, force_balanced: bool = False
    ) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.experts = experts
        self.force_balanced = force_balanced

    def __call__(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        experts: Experts,
        shared: nn.Module | None = None,
    ) -> Tensor:
        """Compute each token's weighted sum over its experts, wherever they are; shapes as in `Dispatcher`."""
        T, K = experts_TK.shape
        journey = self.plan(experts_TK)

        rows = x_TD.index_select(0, journey.pair_R // K)
        arrived = all_to_all_single_autograd(rows, journey.received, journey.sent, self.group)
        shared_TD = None if shared is None else shared(x_TD)  # while the rows travel
        computed = experts(arrived, journey.expert_R)
        returned = all_to_all_single_autograd(
            computed.contiguous(), journey.sent, journey.received, self.group
        )

        # y_t = sum over k of w_tk * row of (t, k)
        position_R = torch.empty_like(journey.pair_R)
        position_R[journey.pair_R] = torch.arange(T * K, device=position_R.device)
        y_TKD = rearrange(returned.index_select(0, position_R), "(t k) d -> t k d", k=K)
        y_TD = (weights_TK.to(y_TKD.dtype)[:, None, :] @ y_TKD)[:, 0]
        return y_TD if shared_TD is None else y_TD + shared_TD

    def plan(self, experts_TK: Tensor) -> Journey:
        """Sort the pairs of a batch by expert, and learn from the other ranks what they send here."""
        flat = experts_TK.flatten()
        pair_R = flat.argsort(stable=True)
        sent_E = torch.bincount(flat, minlength=self.experts)
        received_E = torch.empty_like(sent_E)
        dist.all_to_all_single(received_E, sent_E, group=self.group)
        if self.force_balanced:
            return self._balanced(len(flat), flat.device)

        # Row i: from rank i, to each expert of this rank.
        received = rearrange(received_E, "(ranks e) -> ranks e", ranks=self.ranks)
        sent = rearrange(sent_E, "(ranks e) -> ranks e", ranks=self.ranks)
        sizes = torch.stack([sent.sum(1), received.sum(1)]).tolist()
        numbers = torch.arange(received.shape[1], device=flat.device).repeat(self.ranks)
        expert_R = numbers.repeat_interleave(received_E, output_size=sum(sizes[1]))
        return Journey(pair_R, sizes[0], sizes[1], expert_R)

    def _balanced(self, pairs: int, device: torch.device) -> Journey:
        """Deal the pairs to the experts in turn. All ranks have batches of one size."""
        own = self.experts // self.ranks
        each, more = divmod(pairs, self.experts)
        rows_of_expert = [each + (expert < more) for expert in range(self.experts)]
        sent = [sum(rows_of_expert[rank * own : (rank + 1) * own]) for rank in range(self.ranks)]
        first = dist.get_rank(self.group) * own
        mine = rows_of_expert[first : first + own]
        pair_R = (torch.arange(pairs, device=device) % self.experts).argsort(stable=True)
        expert_R = torch.cat(
            [torch.full((rows,), expert, device=device) for expert, rows in enumerate(mine)]
        )
        return Journey(pair_R, sent, [sum(mine)] * self.ranks, expert_R.repeat(self.ranks))
