"""Arrange the ranks in meshes: one for dense weights, one for experts, one for rows (no section in the paper).

    dense    (pp, dp_replicate, fsdp)           attention, dense MLPs, shared experts, embedding, head
    sparse   (pp, dp_replicate, efsdp, ep)      the same ranks; fsdp = efsdp x ep
    rows     (pp, data, cp)                     the same ranks; dp_replicate x fsdp = data x cp

Neighbours along `ep` are neighbours in rank, so with ep up to the GPUs of a machine the tokens of the experts
stay inside it, on NVLink, while the weights are gathered from the same GPU of each machine. Tokens are
exchanged more often than weights where each rank brings many of them.
"""

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minglm.config import Layout


class Meshes(NamedTuple):
    """The ranks of a run in three arrangements, and the layout that they come from."""

    layout: Layout
    dense: DeviceMesh
    """Axes pp, dp_replicate, fsdp."""
    sparse: DeviceMesh
    """Axes pp, dp_replicate, efsdp, ep."""

    rows: DeviceMesh
    """Axes pp, data, cp: who reads which rows of a batch, and which part of each row."""

    @property
    def data_group(self) -> int:
        """Return which part of a batch's rows this rank reads, from 0 to `layout.data_groups` - 1."""
        return self.rows.get_local_rank("data")


def build_meshes(layout: Layout, device_type: str) -> Meshes:
    """Return the meshes over all ranks of the world.

    Every rank must call it; `layout.world` is their number.
    """
    assert layout.world == dist.get_world_size(), (
        f"{layout} is not for {dist.get_world_size()} ranks"
    )

    def mesh(**sizes: int) -> DeviceMesh:
        return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    pp, replicas = layout.pp, layout.dp_replicate
    dense = mesh(pp=pp, dp_replicate=replicas, fsdp=layout.fsdp)
    sparse = mesh(pp=pp, dp_replicate=replicas, efsdp=layout.efsdp, ep=layout.ep)
    rows = mesh(pp=pp, data=layout.data_groups, cp=layout.cp)
    return Meshes(layout, dense, sparse, rows)
