"""Worlds and meshes: every rank has its place, ranks agree, and what cannot start is one line."""

import itertools

import pytest
import torch
from helpers.world import run_ranks

from minglm.config import Layout
from minglm.parallel import world as world_module
from minglm.parallel.mesh import build_meshes
from minglm.parallel.world import World, start_world

LAYOUTS = [
    Layout(1, 1, 4, 1, 1),
    Layout(1, 1, 4, 2, 2),
    Layout(1, 2, 2, 2, 1),
    Layout(2, 1, 2, 1, 2),
]


def places():
    """Return, for each layout, what this rank reads of a batch and its neighbours along each axis."""
    found = []
    for layout in LAYOUTS:
        meshes = build_meshes(layout, "cpu")
        members = {
            name: mesh[name].mesh.tolist()
            for mesh in (meshes.dense, meshes.sparse, meshes.rows)
            for name in mesh.mesh_dim_names
        }
        found.append((meshes.data_group, meshes.rows.get_local_rank("cp"), members))
    return found


def test_every_rank_has_its_place_in_both_meshes():
    """The groups of an axis have its size and cover the ranks; ep's are neighbours; every part of a batch is read once."""
    by_rank = run_ranks(places, 4)
    for number, layout in enumerate(LAYOUTS):
        sizes = {
            "pp": layout.pp,
            "dp_replicate": layout.dp_replicate,
            "fsdp": layout.fsdp,
            "efsdp": layout.efsdp,
            "ep": layout.ep,
            "data": layout.data_groups,
            "cp": layout.cp,
        }
        for axis, size in sizes.items():
            groups = [by_rank[rank][number][2][axis] for rank in range(4)]
            assert all(len(group) == size and rank in group for rank, group in enumerate(groups))
        for rank in range(4):
            first, *rest = by_rank[rank][number][2]["ep"]
            assert rest == list(range(first + 1, first + layout.ep))
        parts = [by_rank[rank][number][:2] for rank in range(4)]
        wanted = itertools.product(range(layout.data_groups), range(layout.cp))
        assert sorted(parts) == sorted([*wanted] * layout.pp)


def agreements():
    """Return what this rank hears when each rank says its own number."""
    world = World(torch.device("cpu"))
    return [world.agree(world.rank), world.agree(-world.rank), world.is_writer]


def test_ranks_agree_on_the_largest_number():
    """All ranks get the same answer, and exactly one of them writes."""
    assert run_ranks(agreements, 3) == [[2, 0, True], [2, 0, False], [2, 0, False]]


def test_one_process_is_a_world_without_a_group(monkeypatch):
    """Without torchrun nothing is started, and one process agrees with itself."""
    monkeypatch.delenv("RANK", raising=False)
    world = start_world("cpu", 1.0)
    assert (world.rank, world.size, world.has_group, world.agree(7)) == (0, 1, False, 7)
    world.close()


def test_a_machine_without_what_its_ranks_need_says_so(monkeypatch):
    """A torch without NCCL, and fewer GPUs than ranks: one line each, before anything is joined."""
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world_module, "pick_device", torch.device)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device = 'cuda': this torch has no NCCL.*use --device"):
        start_world("cuda", 1.0)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"a rank 5 on this machine, which has 4 GPUs; use .* 4$"):
        start_world("cuda", 1.0)


def fails(rank):
    """Fail on one rank."""
    if torch.distributed.get_rank() == rank:
        raise ValueError("this one is at fault")


def test_the_helper_tells_which_rank_failed():
    """A test of many ranks shows the traceback of the one that is at fault."""
    with pytest.raises(AssertionError, match=r"rank 1 of 2:[\s\S]*this one is at fault"):
        run_ranks(fails, 2, 1)
