"""Share a batch among threads that share the weights, each with its own gradients (no section in the paper).

    replica i:  loss(weights, share i of the batch).backward()        all at the same time
    then:       gradient = gradient of replica 0 + gradient of replica 1 + ...      always in this order

A small model's operations are too short to be shared among the cores of a CPU: two threads inside every
operation make a step of the toy 1.3 times as fast, and 25 times as slow while another program occupies one of
the cores, because each of thousands of operations waits for its last thread. Threads that each compute half
of the batch wait for one another once a step: 1.6 times as fast, and never much slower than one. PyTorch
releases Python's lock while it computes.

Between processes `minglm.parallel.workers` does the same with collectives.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minglm.parallel.sequence import WHOLE

Share = TypeVar("Share")
Result = TypeVar("Result")


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of a model over the same weights and buffers: both see changes in place; gradients are separate."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


class Replicas:
    """A model and `count` - 1 copies that share its weights; see `minglm.parallel.workers.Workers`."""

    in_step = False  # threads need not wait for one another before they have all finished
    expert_ranks = 1
    row_part = WHOLE

    def __init__(self, model: nn.Module, count: int = 1) -> None:
        self.models = [model]
        for _ in range(count - 1):
            self.models.append(sharing(model))

    def __len__(self) -> int:
        return len(self.models)

    def run(
        self, work: Callable[[Any, Share | None], Result], shares: Sequence[Share]
    ) -> list[Result]:
        """Call work(replica, share) for each share, at most one per replica, all at once.

        Return results in order.

        The gradients that `work` leaves in the replicas are added to those of the model itself.
        """
        assert len(shares) <= len(self.models), "more shares than replicas"
        models = self.models[: len(shares)]
        if len(shares) == 1:
            return [work(models[0], shares[0])]
        with ThreadPoolExecutor(
            len(shares), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            results = list(pool.map(work, models, shares))
        for replica in models[1:]:
            self._add_gradients(replica)
        return results

    def sum(self, values: Tensor) -> Tensor:
        """Return the values as they are: `run` returns the results of all threads."""
        return values

    def largest(self, value: float) -> float:
        """Return the value as it is."""
        return value

    def agree(self, number: int) -> int:
        """Return the number as it is."""
        return number

    def watched(self, step: str) -> AbstractContextManager[None]:
        """Watch nothing: threads that fail end the process."""
        return contextlib.nullcontext()

    def slowest(self) -> None:
        """Name no thread: all run on the same cores."""

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict of the model."""
        return self.models[0].state_dict()

    def _add_gradients(self, replica: nn.Module) -> None:
        """Move the gradients of a replica to the model, adding them to what is there."""
        for ours, theirs in zip(self.models[0].parameters(), replica.parameters(), strict=True):
            if theirs.grad is None:
                continue
            ours.grad = theirs.grad if ours.grad is None else ours.grad.add_(theirs.grad)
            theirs.grad = None
