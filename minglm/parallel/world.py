"""Start the ranks that torchrun launched, or one process alone: device, process groups, agreement (no section).

    torchrun --nproc-per-node 8 -m minglm run CONFIG     ->  a world of 8 ranks
    python -m minglm run CONFIG                          ->  a world of one, without any process group

Tensors travel by NCCL between GPUs and by gloo between CPUs. What the ranks agree on, such as to stop, goes
through a group of its own on the CPU (`minglm.common.ranks`), with a long time limit: the others wait there
while one prepares the data. A rank that dies closes its connections, which ends the wait at once.

All ranks must see one disk. Rank 0, the writer, alone writes the log, the records and the report.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from minglm.common import mistakes
from minglm.common.device import pick_device
from minglm.common.ranks import Ranks
from minglm.parallel.faults import Watchdog, check_restarts


class World:
    """The ranks of this run, seen from one of them: those of the process group, or one process alone without it.

    timeout_seconds: most time of a step, and of an agreement; 0: any time.
    """

    def __init__(self, device: torch.device, timeout_seconds: float = 0.0) -> None:
        self.device = device
        self.ranks = Ranks.of_the_world()
        self.rank = self.ranks.rank
        self.size = self.ranks.size
        self.watchdog = Watchdog(timeout_seconds if self.size > 1 else 0.0, self.rank)

    @property
    def is_writer(self) -> bool:
        """Return whether this rank writes the log, the records and the report."""
        return self.rank == 0

    @property
    def has_group(self) -> bool:
        """Return whether there is a process group, which one process started by torchrun has too."""
        return self.ranks.group is not None

    def agree(self, number: int) -> int:
        """Return the largest `number` of all ranks; every rank must call it."""
        if self.ranks.group is None:
            return number
        largest = torch.tensor(number)
        with self.watchdog.during("an agreement of all ranks"):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.ranks.group)
        return int(largest)

    def close(self) -> None:
        """End the process groups."""
        if self.has_group:
            dist.destroy_process_group()


def start_world(device_name: str, timeout_seconds: float) -> World:
    """Join the ranks that torchrun's environment names; without it, return a world of one.

    device_name: as in a config; "auto" and "cuda" are the GPU of the rank's number on this machine.
    timeout_seconds: a step that takes longer ends this process, which then says where it was; so does a
    collective that takes twice as long, anywhere. Raises ValueError, in one line, where there are fewer GPUs
    than ranks, no NCCL, or restarts that cannot work.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(pick_device(device_name))
    check_restarts(os.environ)
    device = _device_of_rank(device_name)
    store, rank, size = next(dist.rendezvous("env://"))

    def speaks_first() -> bool:
        return store.add("reported", 1) == 1

    mistakes.ask_before_speaking(speaks_first)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=2 * timeout_seconds),  # the watchdog has more to say
        device_id=device if device.type == "cuda" else None,
    )
    return World(device, timeout_seconds)


@contextlib.contextmanager
def started_world(device_name: str, timeout_seconds: float) -> Iterator[World]:
    """Yield the world of `start_world`, and end it.

    A rank that fails speaks for all, unless another one did before.
    """
    world = start_world(device_name, timeout_seconds)
    try:
        yield world
    except BaseException:
        mistakes.may_speak()  # now: when this rank closes its connections, the others fail too
        raise
    world.close()


def _device_of_rank(device_name: str) -> torch.device:
    """Return the device of this rank: each rank of a machine has a GPU of its own."""
    device = pick_device(device_name)
    if device.type != "cuda":
        return device
    if not dist.is_nccl_available():
        raise ValueError(
            f"device = {device_name!r}: this torch has no NCCL, through which GPUs talk; "
            "use --device cpu, or install a torch with it"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"torchrun started a rank {local_rank} on this machine, which has {count} GPUs; "
            f"use --nproc-per-node {count}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
