"""A stand-in for DeepEP 1.2.1 that checks every argument and exchanges through torch.distributed, on CPUs.

Signatures, shapes, dtypes and what they demand of each other are those of `deep_ep/buffer.py` and `csrc/deep_ep.cpp` of
that version. Two demands of the kernels can be left out, since the contract of a dispatcher is for small float32 tokens:
`STRICT` is bfloat16 and rows of a multiple of 512 bytes.
"""

import torch
import torch.distributed as dist

topk_idx_t = torch.int64
STRICT = False
SETTINGS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
CALLS = []
"""Names of the calls of this process, in order."""


class Config:
    """Settings of the kernels for a number of ranks."""

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        """Return the bytes of the buffer for NVLink."""
        return 1000 * hidden_bytes * min(num_ranks, 8)

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        """Return the bytes of the buffer for RDMA, 0 inside a node."""
        return 1000 * hidden_bytes * num_ranks if num_ranks > 8 else 0


class EventOverlap:
    """What a call with `async_finish` returns: its tensors may be read after a wait."""

    def __init__(self, tensors):
        self.hidden = [(tensor, tensor.clone()) for tensor in tensors]
        for tensor in tensors:  # what is read too early is garbage
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

    @torch.no_grad()
    def current_stream_wait(self):
        """Let the tensors arrive."""
        for tensor, value in self.hidden:
            tensor.copy_(value)


class Handle:
    """The notes of a dispatch: which token went where, and how many came from each rank."""

    def __init__(self, is_token_in_rank, received):
        self.is_token_in_rank = is_token_in_rank
        self.received = received


class Buffer:
    """Exchanges tokens among the ranks of a group."""

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        assert isinstance(group, dist.ProcessGroup)
        assert num_nvl_bytes > 0
        self.group = group
        self.group_size = group.size()
        self.num_nvl_bytes = num_nvl_bytes

    @staticmethod
    def get_dispatch_config(num_ranks):
        """Return the settings; there are some for certain numbers of ranks only."""
        assert num_ranks in SETTINGS, f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts):
        """Count the tokens for each rank and expert."""
        CALLS.append("layout")
        assert topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == topk_idx_t
        assert num_experts > 0 and num_experts % self.group_size == 0
        rank = topk_idx // (num_experts // self.group_size)
        ranks = torch.arange(self.group_size)
        is_token_in_rank = (rank[:, :, None] == ranks).any(1)
        per_rank = is_token_in_rank.sum(0).int()
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        return per_rank, None, per_expert, is_token_in_rank, None

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        async_finish=False,
    ):
        """Send each token once to each rank that it is for."""
        self.check_tokens(x)
        if handle is not None:
            CALLS.append("dispatch again")
            assert topk_idx is None and topk_weights is None
            assert len(x) == len(handle.is_token_in_rank)
            arrived = self.send(x, handle.is_token_in_rank, handle.received)
            return arrived, None, None, None, None, self.event([arrived], async_finish)

        CALLS.append("dispatch")
        assert num_tokens_per_rdma_rank is None  # inside a node
        experts = len(num_tokens_per_expert)
        own = experts // self.group_size
        found = self.get_dispatch_layout(topk_idx, experts)
        CALLS.pop()
        for given, computed in zip(
            (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank),
            (found[0], found[2], found[3]),
            strict=True,
        ):
            assert given.dtype == computed.dtype and torch.equal(given, computed)
        assert topk_weights.shape == topk_idx.shape == (len(x), topk_idx.shape[1])
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()

        sizes = [torch.zeros_like(num_tokens_per_rank) for _ in range(self.group_size)]
        dist.all_gather(sizes, num_tokens_per_rank, group=self.group)
        received = [int(size[self.group.rank()]) for size in sizes]
        recv_x, recv_idx, recv_weights = (
            self.send(tensor, is_token_in_rank, received) for tensor in (x, topk_idx, topk_weights)
        )
        recv_idx -= self.group.rank() * own
        elsewhere = (recv_idx < 0) | (recv_idx >= own)
        recv_idx[elsewhere] = -1
        recv_weights[elsewhere] = 0.0
        counts = recv_idx[~elsewhere].bincount(minlength=own).tolist()
        event = self.event([recv_x, recv_idx, recv_weights], async_finish)
        handle = Handle(is_token_in_rank, received)
        return recv_x, recv_idx, recv_weights, counts, handle, event

    def combine(self, x, handle, topk_weights=None):
        """Send the tokens back, and add up what the ranks of each token sent."""
        CALLS.append("combine")
        self.check_tokens(x)
        assert len(x) == sum(handle.received)
        summed = self.bring_back(x, handle)
        if topk_weights is None:
            return summed, None, None
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        assert topk_weights.dim() == 2 and len(topk_weights) == len(x)
        return summed, self.bring_back(topk_weights, handle), None

    def check_tokens(self, x):
        """Demand what the kernels demand of tokens."""
        assert x.dim() == 2 and x.is_contiguous()
        assert self.num_nvl_bytes >= 1000 * 2 * x.shape[1]
        if STRICT:
            assert x.dtype == torch.bfloat16 and x.shape[1] * 2 % 512 == 0

    def send(self, rows, is_token_in_rank, received):
        """Exchange: the rows for each rank, in their order."""
        places = [is_token_in_rank[:, rank].nonzero()[:, 0] for rank in range(self.group_size)]
        sent = rows[torch.cat(places)].contiguous()
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, sent, received, list(map(len, places)), group=self.group)
        return arrived

    def bring_back(self, rows, handle):
        """Exchange the other way round; sum in float32, as the kernels do."""
        places = [mask.nonzero()[:, 0] for mask in handle.is_token_in_rank.T]
        sizes = list(map(len, places))
        back = rows.new_empty(sum(sizes), *rows.shape[1:])
        dist.all_to_all_single(back, rows.contiguous(), sizes, handle.received, group=self.group)
        tokens = len(handle.is_token_in_rank)
        summed = torch.zeros(tokens, *rows.shape[1:])
        return summed.index_add(0, torch.cat(places), back.float()).to(rows.dtype)

    def event(self, tensors, async_finish):
        """Return the event of a call that may still be under way."""
        return EventOverlap(tensors) if async_finish else EventOverlap([])
