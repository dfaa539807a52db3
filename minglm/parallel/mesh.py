"""Arrange the ranks in two meshes: one for dense weights, one for experts (no section in the paper).

    dense    (pp, dp_replicate, fsdp)           attention, dense MLPs, shared experts, embedding, head
    sparse   (pp, dp_replicate, efsdp, ep)      the same ranks; fsdp = efsdp x ep

Neighbours along `ep` are neighbours in rank, so with ep up to the GPUs of a machine the tokens of the experts stay inside
it, on NVLink, while the weights are gathered from the same GPU of each machine. Tokens are exchanged more often than weights
where each rank brings many of them.
"""

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minglm.config import Layout


class Meshes(NamedTuple):
    """The ranks of a run in two arrangements, and the layout that both come from."""

    layout: Layout
    dense: DeviceMesh
    """Axes pp, dp_replicate, fsdp."""
    sparse: DeviceMesh
    """Axes pp, dp_replicate, efsdp, ep."""

    @property
    def data_group(self) -> int:
        """Return which part of a batch's rows this rank reads, from 0 to `layout.data_groups` - 1."""
        replica = self.dense.get_local_rank("dp_replicate")
        member = self.dense.get_local_rank("fsdp")
        return (replica * self.layout.fsdp + member) // self.layout.cp

    @property
    def part_of_sequence(self) -> int:
        """Return which part of each row this rank reads, from 0 to cp - 1."""
        return self.dense.get_local_rank("fsdp") % self.layout.cp


def build_meshes(layout: Layout, device_type: str) -> Meshes:
    """Return both meshes over all ranks of the world. Every rank must call it; `layout.world` is their number."""
    assert layout.world == dist.get_world_size(), (
        f"{layout} is not for {dist.get_world_size()} ranks"
    )
    outer = (layout.pp, layout.dp_replicate)
    dense = init_device_mesh(
        device_type, (*outer, layout.fsdp), mesh_dim_names=("pp", "dp_replicate", "fsdp")
    )
    sparse = init_device_mesh(
        device_type,
        (*outer, layout.efsdp, layout.ep),
        mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"),
    )
    return Meshes(layout, dense, sparse)
