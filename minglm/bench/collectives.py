"""Measure the links of a cluster: each collective along each axis of the mesh, in bytes per second (no section).

    torchrun --nproc-per-node 8 -m minglm bench collectives configs/flash_30b.py:h100x8

    GB/s = size * (ranks - 1) / ranks / seconds

`size` is what a rank gets, its own part included; that part does not travel. It is the number that NCCL's own
tests call bus bandwidth, and what `minglm plan` takes for a link: on a new cluster, compare them before a
long run. The slowest rank counts, and the median of the rounds. gloo between CPUs shows that the program
runs; its numbers mean nothing for GPUs.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from minglm.config import Layout
from minglm.parallel.mesh import build_meshes
from minglm.parallel.world import World

WARM_UP = 2
"""Rounds before those that count: the first one connects the ranks."""


class Link(NamedTuple):
    """One collective of one size along one axis."""

    axis: str
    ranks: int
    operation: str
    bytes: int
    """That each rank gets, its own part included."""
    seconds: float
    gigabytes_per_second: float


def axes(layout: Layout, device_type: str) -> dict[str, dist.ProcessGroup]:
    """Return this rank's group along every axis with more than one rank. Every rank must call it."""
    meshes = build_meshes(layout, device_type)
    found = {
        "pp": meshes.dense["pp"],
        "dp_replicate": meshes.dense["dp_replicate"],
        "fsdp": meshes.dense["fsdp"],
        "efsdp": meshes.sparse["efsdp"],
        "ep": meshes.sparse["ep"],
        "cp": meshes.rows["cp"],
    }
    return {name: mesh.get_group() for name, mesh in found.items() if mesh.size() > 1}


def measure(world: World, layout: Layout, sizes: Sequence[int], rounds: int) -> list[Link]:
    """Return what every collective reaches along every axis. Every rank must call it, and gets the same.

    sizes: bytes that each rank gets, rounded up to whole parts. rounds: of which the median counts.
    """
    links = []
    for axis, group in axes(layout, world.device.type).items():
        ranks = dist.get_world_size(group)
        for size in sizes:
            part = -(-size // ranks // 4) * 4
            for operation, call in _operations(group, ranks, part, world.device).items():
                seconds = _seconds(world, call, rounds)
                moved = part * (ranks - 1)
                links.append(
                    Link(axis, ranks, operation, part * ranks, seconds, moved / seconds / 1e9)
                )
    return links


def _operations(
    group: dist.ProcessGroup, ranks: int, part: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Return the collectives of a training step, on buffers of `ranks` parts of `part` bytes."""
    one = torch.zeros(part // 4, device=device)
    whole = torch.zeros(part // 4 * ranks, device=device)
    other = torch.zeros_like(whole)
    return {
        "gather": lambda: dist.all_gather_into_tensor(whole, one, group=group),
        "reduce": lambda: dist.reduce_scatter_tensor(one, whole, group=group),
        "exchange": lambda: dist.all_to_all_single(other, whole, group=group),
    }


def _seconds(world: World, call: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of a call, in each round those of the slowest rank."""
    spent = []
    for _ in range(WARM_UP + rounds):
        dist.barrier()
        began = time.perf_counter()
        call()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        mine = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=world.device)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        spent.append(float(mine))
    return statistics.median(spent[WARM_UP:])


def table(links: Sequence[Link]) -> str:
    """Return the links as text."""
    lines = [
        f"{'axis':<14}{'ranks':>6}  {'operation':<10}{'MiB':>10}{'milliseconds':>14}{'GB/s':>9}"
    ]
    for link in links:
        lines.append(
            f"{link.axis:<14}{link.ranks:>6}  {link.operation:<10}{link.bytes / 2**20:>10.3g}"
            f"{1000 * link.seconds:>14.3f}{link.gigabytes_per_second:>9.3g}"
        )
    return "\n".join(lines)


def record(world: World, layout: Layout, links: Sequence[Link]) -> dict[str, Any]:
    """Return the record of a measurement, as JSON values."""
    from minglm.common.version import versions

    return {
        "bench": "collectives",
        "versions": versions(),
        "device": world.device.type,
        "layout": layout._asdict(),
        "links": [link._asdict() for link in links],
    }
