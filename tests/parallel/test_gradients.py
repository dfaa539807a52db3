"""The norm of a sharded gradient is that of the whole one, on every rank, and so is the guard's decision."""

import math

import pytest
import torch
import torch.distributed as dist
from helpers.world import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from minglm.config import OptimizerConfig
from minglm.optim.muon import Muon
from minglm.parallel import gradients
from minglm.parallel.gradients import clip_gradients, global_norm
from minglm.testing.strategies import numbers, seeds
from minglm.train.guard import Guard, SkipReason, guarded_step

SHAPES = [(5, 3), (1,), (4, 6, 2), (4, 2, 6), (3, 8)]


def models(seed, size=1.0):
    """Return the same drawn weights and gradients whole, and sharded over two meshes."""
    dense = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "fsdp"))
    sparse = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    whole, sharded = torch.nn.Module(), torch.nn.Module()
    generator = numbers(seed)
    for i, shape in enumerate(SHAPES):
        mesh, placements = dense, (Replicate(), Shard(0))
        if len(shape) == 3:
            mesh, placements = sparse, (Shard(1), Shard(0))
        weight = torch.randn(shape, generator=generator)
        gradient = size * torch.randn(shape, generator=generator)
        whole.register_parameter(f"p{i}", torch.nn.Parameter(weight))
        shard = distribute_tensor(weight.clone(), mesh, placements, src_data_rank=None)
        sharded.register_parameter(f"p{i}", torch.nn.Parameter(shard))
        if i == 4 and seed % 2:
            continue  # without a gradient
        whole.get_parameter(f"p{i}").grad = gradient
        sharded.get_parameter(f"p{i}").grad = distribute_tensor(
            gradient.clone(), mesh, placements, src_data_rank=None
        )
    return whole, sharded


def norms(sizes):
    """Return (norm whole, norm sharded, largest difference of a clipped gradient) for gradients of several sizes."""
    results = []
    for seed, size in enumerate(sizes):
        whole, sharded = models(seed, size)
        pair = [float(global_norm(model)) for model in (whole, sharded)]
        for model in (whole, sharded):
            clip_gradients(model, 2.0, global_norm(model))
        errors = [
            (ours.grad.full_tensor() - theirs.grad).abs().max().item() / size
            for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True)
            if theirs.grad is not None
        ]
        results.append((*pair, max(errors)))
    return results


def test_sharded_and_whole_gradients_have_one_norm():
    """Rows, experts and copies on two meshes: every rank finds the norm of one process, and clips to it."""
    sizes = [1.0, 0.01, 100.0, 1e-12, 1e15]
    results = run_ranks(norms, 4, sizes)
    for on_rank in results:
        assert on_rank == results[0]  # the same bits
        for size, (whole, sharded, error) in zip(sizes, on_rank, strict=True):
            # float32: sums in another order
            assert sharded == pytest.approx(whole, rel=1e-6) and error < 1e-5, size


def norm_without_copies():
    """Return the norm where each copy of a row counts as a further row, and the right one."""
    whole, sharded = models(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "copies", lambda gradient: 1)
        return float(global_norm(sharded)), float(global_norm(whole))


def test_a_norm_that_counts_copies_is_found():
    """The broken twin: two replicas make the norm of the dense part 1.4 times as large."""
    wrong, right = run_ranks(norm_without_copies, 4)[0]
    assert wrong != pytest.approx(right, rel=0.05)


def guarded(values):
    """Take a step for each value that one element of one rank's gradient is set to. Return what became of them."""
    outcomes = []
    for value in values:
        _, sharded = models(1)
        optimizer = Muon(sharded, OptimizerConfig())
        before = [parameter.detach().to_local().clone() for parameter in sharded.parameters()]
        if dist.get_rank() == 3:
            sharded.get_parameter("p2").grad.to_local()[0, 0, 0] = value
        guard = Guard(spike_factor=2.0)
        guard.norms.extend([8.0] * 20)
        result = guarded_step(sharded, optimizer, 0.1, 1.0, guard)
        moved = any(
            not torch.equal(old, parameter.detach().to_local())
            for old, parameter in zip(before, sharded.parameters(), strict=True)
        )
        outcomes.append((result.left_out, moved, str(result.grad_norm)))
    return outcomes


def test_what_one_rank_finds_all_skip():
    """A NaN, an infinity or a spike on the last rank is skipped by all; otherwise all take the step."""
    for outcomes in run_ranks(guarded, 4, [math.nan, math.inf, 1e6, 0.0]):
        assert [reason for reason, _, _ in outcomes] == [
            SkipReason.NOT_FINITE,
            SkipReason.NOT_FINITE,
            SkipReason.SPIKE,
            None,
        ]
        assert [moved for _, moved, _ in outcomes] == [False, False, False, True]


def partly_sharded():
    """Return the message for a model that is sharded in part."""
    _, sharded = models(0)
    sharded.register_parameter("forgotten", torch.nn.Parameter(torch.ones(2)))
    try:
        return float(global_norm(sharded))
    except ValueError as error:
        return str(error)


def test_a_model_sharded_in_part_is_refused():
    """Nobody can know which ranks have the rest."""
    assert "sharded whole or not at all" in run_ranks(partly_sharded, 4)[0]


@given(
    seeds, st.sampled_from([1e-6, 0.5, 1.0, 30.0]), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_whole_gradients_are_clipped_as_by_torch(seed, bound, dtype):
    """Without DTensors norm and clipped gradients are those of torch.nn.utils, bit for bit, and need no process group."""
    ours, theirs = torch.nn.Module(), torch.nn.Module()
    generator = numbers(seed)
    for i, shape in enumerate(SHAPES):
        weight = torch.randn(shape, generator=generator).to(dtype)
        gradient = torch.randn(shape, generator=generator).to(dtype)
        for model in (ours, theirs):
            model.register_parameter(f"p{i}", torch.nn.Parameter(weight.clone()))
            model.get_parameter(f"p{i}").grad = gradient.clone()
    norm = global_norm(ours)
    clip_gradients(ours, bound, norm)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), bound))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
