"""What a training loop needs of those who share its batches: threads of one process, or ranks (no section in the paper).

    shares  ->  run(work, shares)  ->  each worker: loss(share).backward()  ->  gradients of the whole batch in the model
                sum(terms)         ->  the terms of the whole batch

A loop is written once, against this interface. `Replicas` are threads over one set of weights; `ShardedWorker` is one of
the ranks over which the weights are sharded.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minglm.data.packing import Batch
from minglm.parallel.faults import SlowRank, slowest_rank
from minglm.parallel.mesh import Meshes
from minglm.parallel.sequence import cut
from minglm.parallel.world import World

Share = TypeVar("Share")
Result = TypeVar("Result")


class Workers(Protocol):
    """Those who share the batches of a training loop."""

    in_step: bool
    """Whether all workers must make the same number of forward and backward passes: ranks meet in each of them."""
    expert_ranks: int
    """Ranks that the experts of a layer are divided over; the load of each is logged."""

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

    def cut(self, microbatch: Batch) -> Batch:
        """Return the part of some rows that this process computes: all of them, unless ranks share each row."""
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

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict of the whole model; its tensors may be those of the model itself."""
        ...


class ShardedWorker:
    """One rank of those that share the batches and the weights of a sharded model."""

    in_step = True

    def __init__(self, model: nn.Module, world: World, meshes: Meshes) -> None:
        self.model = model
        self.world = world
        self.meshes = meshes
        self.expert_ranks = meshes.layout.ep

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

    def cut(self, microbatch: Batch) -> Batch:
        """Return this rank's positions of each row; all of them with cp = 1."""
        ranks = self.meshes.layout.cp
        return (
            cut(microbatch, self.meshes.rows.get_local_rank("cp"), ranks)
            if ranks > 1
            else microbatch
        )

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

    def weights(self) -> dict[str, Tensor]:
        """Gather the whole model on every rank; of a stage of a pipeline, its part."""
        return {name: gathered(tensor) for name, tensor in self.model.state_dict().items()}

    def gather_into(self, whole: nn.Module) -> None:
        """Give a model that is not sharded the weights of all ranks, tensor by tensor."""
        own = self.model.state_dict()
        stages = self.meshes.dense["pp"]
        for name, tensor in whole.state_dict().items():
            if name in own:
                tensor.copy_(gathered(own[name]))
            if stages.size() > 1:  # the stage that has it sends it to the others
                owner = self.world.agree(stages.get_local_rank() if name in own else -1)
                dist.broadcast(tensor, group_src=owner, group=stages.get_group())


def gathered(tensor: Tensor) -> Tensor:
    """Return a DTensor whole, on every rank of its mesh, all of which must call it; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
