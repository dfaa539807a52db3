"""What a training loop needs of those who share its batches: threads of one process, or ranks (no section in the paper).

    shares  ->  run(work, shares)  ->  each worker: loss(share).backward()  ->  gradients of the whole batch in the model
                sum(terms)         ->  the terms of the whole batch

A loop is written once, against this interface. `Replicas` are threads over one set of weights;
`ShardedWorker` is one of the ranks over which the weights are sharded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minglm.parallel.faults import SlowRank, slowest_rank
from minglm.parallel.mesh import Meshes
from minglm.parallel.sequence import RowPart
from minglm.parallel.shard import own_part
from minglm.parallel.world import World

Share = TypeVar("Share")
Result = TypeVar("Result")


class Workers(Protocol):
    """Those who share the batches of a training loop."""

    in_step: bool
    """Whether all workers must make the same number of forward and backward passes: ranks meet in each of them."""
    expert_ranks: int
    """Ranks that the experts of a layer are divided over; the load of each is logged."""
    row_part: RowPart
    """Which part of each row this process computes: all of it, unless ranks share rows."""

    def __len__(self) -> int:
        """Return into how many shares a batch is cut, at most."""
        ...

    def run(
        self, work: Callable[[Any, Share | None], Result], shares: Sequence[Share]
    ) -> list[Result]:
        """Call work(model, share) for each share, at most one a worker; None where there are fewer shares than workers.

        Returns the results of the shares that this process computed. The gradients of all shares add up in the model.
        """
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over all processes."""
        ...

    def largest(self, value: float) -> float:
        """Return the largest `value` of all processes."""
        ...

    def agree(self, number: int) -> int:
        """Return the largest `number` of all processes, such as a signal that only one of them got."""
        ...

    def watched(self, step: str) -> AbstractContextManager[None]:
        """Watch a step, by its name: where others would wait for this process for too long, it ends and says so."""
        ...

    def slowest(self) -> SlowRank | None:
        """Return the process that is much slower than the others, if there is one."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """Return the state dict of the whole model; its tensors may be those of the model itself.

        Where ranks share the model, a tensor is gathered when it is asked for: by all of them, in the same order.
        """
        ...


BUCKET_BYTES = 512 * 2**20
"""Bytes that are gathered at a time."""


class ShardedWorker:
    """One rank of those that share the batches and the weights of a sharded model."""

    in_step = True

    def __init__(self, model: nn.Module, world: World, meshes: Meshes) -> None:
        self.model = model
        self.world = world
        self.meshes = meshes
        self.expert_ranks = meshes.layout.ep
        self.row_part = RowPart(meshes.rows.get_local_rank("cp"), meshes.layout.cp)

    def __len__(self) -> int:
        return self.meshes.layout.data_groups

    def run(
        self, work: Callable[[Any, Share | None], Result], shares: Sequence[Share]
    ) -> list[Result]:
        """Call work(model, this rank's share). The backward passes add up the gradients of all ranks."""
        return [work(self.model, self.own_share(shares))]

    def own_share(self, shares: Sequence[Share]) -> Share | None:
        """Return the share of this rank's data group; None where there are fewer shares than groups."""
        assert len(shares) <= len(self), "more shares than ranks"
        number = self.meshes.data_group
        return shares[number] if number < len(shares) else None

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over all ranks."""
        values = values.to(self.world.device)
        dist.all_reduce(values)
        return values.cpu()

    def largest(self, value: float) -> float:
        """Return the largest `value` of all ranks."""
        largest = torch.tensor(value, dtype=torch.float64, device=self.world.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def agree(self, number: int) -> int:
        """Return the largest `number` of all ranks."""
        return self.world.agree(number)

    def watched(self, step: str) -> AbstractContextManager[None]:
        """Watch a step, by its name, on this rank."""
        return self.world.watchdog.during(step)

    def slowest(self) -> SlowRank | None:
        """Return the rank that is much slower than the others, if there is one."""
        return slowest_rank(self.world.device, self.world.ranks)

    def weights(self) -> "Gathered":
        """Return the state dict of the model, of a stage of a pipeline its part; each tensor is gathered when asked for."""
        return Gathered(self.model.state_dict())

    @torch.no_grad()
    def gather_into(self, whole: nn.Module) -> None:
        """Give a model with all layers the weights of all ranks, tensor by tensor; it may be sharded itself, otherwise."""
        own = self.model.state_dict()
        stages = self.meshes.dense["pp"]
        for name, target in whole.state_dict().items():
            if name in own:
                value = gathered(own[name])
            else:
                value = torch.empty(target.shape, dtype=torch.float32, device=target.device)
            if stages.size() > 1:  # the stage that has it sends it to the others
                owner = self.world.agree(stages.get_local_rank() if name in own else -1)
                value = value.contiguous()
                dist.broadcast(value, group_src=owner, group=stages.get_group())
            part = own_part(target)
            part.values.copy_(value[part.where])


class Gathered(Mapping[str, Tensor]):
    """Tensors of a sharded model, each of which is gathered when it is asked for, by all ranks in the same order."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        return gathered(self.state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def gathered(tensor: Tensor) -> Tensor:
    """Return a DTensor whole, on every rank of its mesh, all of which must call it; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def buckets(model: nn.Module, most_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
    """Yield the state dict of a model, sharded or not, as whole tensors of at most `most_bytes` together, or one larger.

    All ranks of a sharded model must go through all of it: each bucket is gathered when its turn comes.
    """
    names: list[str] = []
    size = 0
    state = model.state_dict()
    for name, tensor in state.items():
        more = tensor.numel() * tensor.element_size()
        if names and size + more > most_bytes:
            yield {name: gathered(state[name]) for name in names}
            names = []
            size = 0
        names.append(name)
        size += more
    yield {name: gathered(state[name]) for name in names}
