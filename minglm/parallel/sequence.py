"""Share each sequence among ranks: context parallelism for 32K to 128K tokens (no section in the paper).

    each rank: S / ranks positions, all heads  ->  all-to-all  ->  all positions, N / ranks heads  ->  attention
               S / ranks positions, all heads  <-  all-to-all  <-  all positions, N / ranks heads

Everything in the model but attention looks at one position at a time, so ranks may hold different positions
of a row. Attention looks at one head at a time, so for it alone the ranks exchange positions for heads
(Ulysses, arXiv 2309.14509). Each rank then has whole rows, and attention, masks and packed documents are what
they are without any sharing. So is the work: a causal mask gives the last positions of a row the most to do,
but every rank has all positions.

What else crosses a cut:

    targets, MTP        The tokens one and two positions ahead come with the rank's own positions (`Batch.ahead`).
    rotary angles       Positions are numbered before the rows are cut.
    balance of a row    Choices are counted over the whole row (`minglm.model.balance`), by one all-reduce.

Choices:
- Where there are more ranks than key/value heads, each head goes to several ranks: 8 heads on 16 ranks go to two each,
  and each of the two has half of the head's query heads. To gather all keys and values on every rank instead would
  move and keep 8 times as much, and give each rank other queries, whose work has to be balanced.
- The ids of documents are gathered once for all layers of a pass: 0.5 MB for 128K positions.
- Every rank reads the whole batch and cuts its positions out (`cut`), so nothing is sent to share it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from minglm.data.packing import Batch
from minglm.kernels.attention import Documents, SharedPrompts, flash_attention
from minglm.model.attention import Attend, Attention
from minglm.model.balance import whole_row
from minglm.model.mla import LatentAttention
from minglm.model.moe import MoE

AHEAD = 2
"""Positions after a cut that its targets lie in: the MTP layer predicts the token after next."""


class RowPart(NamedTuple):
    """Which part of each row a process computes."""

    rank: int
    ranks: int

    def bounds(self, length: int) -> tuple[int, int, int]:
        """Return (begin, end, ahead) for rows of `length`, a multiple of the ranks.

        Of the positions from begin to end the last `ahead`, at most `AHEAD`, are another rank's; their tokens are targets.
        """
        own = length // self.ranks
        begin = self.rank * own
        end = min(begin + own + AHEAD, length)
        return begin, end, end - begin - own


WHOLE = RowPart(0, 1)
"""The part of a process that shares no row."""


def cut(batch: Batch, part: RowPart) -> Batch:
    """Return the positions of each row that belong to a rank, and up to `AHEAD` after them.

    batch: whole rows, whose length is a multiple of the ranks that share them.
    """
    if part.ranks == 1:
        return batch
    B, S = batch.tokens_BS.shape
    begin, end, ahead = part.bounds(S)
    positions_BS = batch.positions_BS
    if positions_BS is None:
        positions_BS = torch.arange(S, device=batch.tokens_BS.device).expand(B, S)
    numbered = dataclasses.replace(batch, positions_BS=positions_BS)
    cut_out = numbered.map(lambda tensor_BS: tensor_BS[:, begin:end])
    return dataclasses.replace(cut_out, ahead=ahead)


class HeadExchange:
    """Attention over whole rows, each of which is cut into the positions of the ranks of a group.

    group: the ranks that share each row, in the order of their positions. attend: attention over whole rows.
    """

    def __init__(self, group: dist.ProcessGroup, attend: Attend = flash_attention) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.attend = attend
        self.part_BS: Tensor | None = None
        self.documents_BS: Tensor | None = None

    def __call__(
        self,
        q_BSNA: Tensor,
        k_BSMA: Tensor,
        v_BSMA: Tensor,
        documents_BS: Documents | None = None,
    ) -> Tensor:
        """Attend q (B, S, N, A) over k and v (B, S, M, A), where S are this rank's positions; return q's shape.

        N is a multiple of the ranks; M is one, or divides their number.
        """
        assert not isinstance(documents_BS, SharedPrompts), "a row of several texts is not cut"
        # More ranks than key/value heads: copies of a head go to ranks that are next to each other.
        copies = max(1, self.ranks // k_BSMA.shape[2])
        k_BSMA = repeat(k_BSMA, "b s m a -> b s (m copies) a", copies=copies)
        v_BSMA = repeat(v_BSMA, "b s m a -> b s (m copies) a", copies=copies)

        # Positions for heads; q, k and v travel together.
        by_rank = [
            rearrange(heads, "b s (ranks n) a -> ranks b s n a", ranks=self.ranks)
            for heads in (q_BSNA, k_BSMA, v_BSMA)
        ]
        sizes = [heads.shape[3] for heads in by_rank]
        arrived = self._exchange(torch.cat(by_rank, 3))
        whole = rearrange(arrived, "ranks b s n a -> b (ranks s) n a")
        q, k, v = whole.split(sizes, 2)
        out = self.attend(q, k, v, self._whole_rows(documents_BS))

        # Heads for positions.
        arrived = self._exchange(
            rearrange(out, "b (ranks s) n a -> ranks b s n a", ranks=self.ranks)
        )
        return rearrange(arrived, "ranks b s n a -> b s (ranks n) a")

    def _exchange(self, x: Tensor) -> Tensor:
        """Send x[i] to rank i; return what comes from rank i at i."""
        return all_to_all_single_autograd(x.contiguous(), None, None, self.group)

    def _whole_rows(self, documents_BS: Tensor | None) -> Tensor | None:
        """Return the documents of whole rows.

        All layers of a pass ask with the same tensor; the first one gathers it.
        """
        if documents_BS is None:
            return None
        if documents_BS is not self.part_BS:
            parts = [torch.empty_like(documents_BS) for _ in range(self.ranks)]
            dist.all_gather(parts, documents_BS.contiguous(), group=self.group)
            self.part_BS = documents_BS
            self.documents_BS = torch.cat(parts, 1)
        return self.documents_BS


def share_sequences(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Let the ranks of a group share each row: give every attention a `HeadExchange`, and every MoE layer a sum over rows.

    The model then takes what `cut` returns.
    """

    def sum_over_ranks(counts: Tensor) -> Tensor:
        dist.all_reduce(counts, group=group)
        return counts

    exchange = HeadExchange(group)
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention):
            module.attend = exchange
        if isinstance(module, MoE):
            module.sum_over_row = sum_over_ranks


@contextlib.contextmanager
def whole_rows(model: nn.Module) -> Iterator[None]:
    """Undo `share_sequences` for a while: the model takes whole rows.

    A model whose rows are whole is left as it is.
    """
    shared = [
        (module, module.attend)
        for module in model.modules()
        if isinstance(module, Attention | LatentAttention)
        and isinstance(module.attend, HeadExchange)
    ]
    sums = [(module, module.sum_over_row) for module in model.modules() if isinstance(module, MoE)]
    for module, exchange in shared:
        module.attend = exchange.attend
    for module, _ in sums:
        module.sum_over_row = whole_row
    try:
        yield
    finally:
        for module, exchange in shared:
            module.attend = exchange
        for module, sum_over_row in sums:
            module.sum_over_row = sum_over_row
