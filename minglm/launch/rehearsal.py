"""Rehearse a run without a GPU: the whole world in one process, the real model, sharding and step, no numbers (no section).

    fake world of N ranks  ->  model on the meta device  ->  shard  ->  one step on tensors without numbers

What is real: the meshes, the sharding, the dispatcher, the loop, clipping and the optimizer, all that a rank executes, seen
from rank 0. What is not: numbers, and the kernels of a GPU, for which `minglm.launch.stand_ins` keep as much memory. So
the bytes of parameters and optimizer are exact, collectives are those of a real step, and the peak is that of PyTorch's
tensors: without NCCL's buffers, fragmentation, and gathers that run ahead.

The passes of a deep model are extrapolated from two shallow ones: every layer after the dense ones is the same, so memory
and collectives are linear in their number. Sharding and optimizer are those of the whole model.

Experts have equal loads (the dispatcher's `force_balanced`). Simplified: no pipeline stages.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minglm.config import Layout, Packing, RunConfig
from minglm.data.packing import Batch
from minglm.kernels import dispatch
from minglm.launch.fake import CollectiveKind, Watch
from minglm.launch.stand_ins import STAND_INS
from minglm.model.glm import GLM
from minglm.model.moe import MoE
from minglm.optim.muon import Muon
from minglm.parallel import parallelize
from minglm.parallel.dispatcher import AllToAllDispatcher
from minglm.parallel.local import local
from minglm.parallel.mesh import build_meshes
from minglm.parallel.shard import shard
from minglm.parallel.world import World
from minglm.plan.text import size
from minglm.train.guard import Guard, guarded_step
from minglm.train.loop import Phase, accumulate
from minglm.train.stages import phases

SHALLOW = (2, 4)
"""MoE layers of the two models whose steps are tracked."""


class Held(NamedTuple):
    """Bytes of one rank between two steps."""

    weights: int
    """Parameters and buffers."""
    optimizer: int


Collectives = dict[CollectiveKind, tuple[int, int]]
"""Number and bytes of collectives by kind."""


class Step(NamedTuple):
    """What a micro-batch of one depth takes."""

    held: int
    """Bytes between two steps."""
    peak: int
    """Most bytes during a micro-batch, gradients of an earlier one included."""
    collectives: Collectives
    """Of a micro-batch."""


class Update(NamedTuple):
    """What clipping and the optimizer take, at the depth of the model."""

    peak: int
    """Most bytes, gradients included."""
    collectives: Collectives


class Rehearsal(NamedTuple):
    """The result of a rehearsal, seen from rank 0."""

    parameters: int
    """Of the whole model, without buffers."""
    largest: int
    """Parameters on the rank that has most."""
    smallest: int
    """Parameters on the rank that has least: where sizes do not divide evenly, the last one."""
    held: Held
    step: Step
    update: Update
    extrapolated: bool
    seconds: float
    """That the rehearsal took."""


def rehearse(run: RunConfig, layout: Layout, stage: str) -> Rehearsal:
    """Rehearse a stage of pre- or mid-training in a layout. Raises ValueError for pipeline stages."""
    if layout.pp > 1:
        raise ValueError("a rehearsal has no pipeline stages yet; use --parallel.pp 1")
    began = time.perf_counter()
    phase = next(phase for phase in phases(run) if phase.name == stage)
    whole = run.model.num_hidden_layers
    shallow = [run.model.first_k_dense_replace + layers for layers in SHALLOW]
    with fake_world(layout.world) as world:
        model = sharded(run, layout)
        optimizer = Muon(model, run.optimizer)
        sizes = [numbers_on_ranks(p) for p in model.parameters()]
        held = Held(
            weights=_bytes([*model.parameters(), *model.buffers()]),
            optimizer=_bytes(
                [value for state in optimizer.state.values() for value in state.values()]
            ),
        )
        parameters = sum(p.numel() for p in model.parameters())
        update = track_update(run, model, phase)
        if whole <= shallow[1]:
            step = track(run, layout, phase, world)
        else:
            steps = [track(with_layers(run, layers), layout, phase, world) for layers in shallow]
            distance = (whole - shallow[0]) / (shallow[1] - shallow[0])
            step = extrapolate(steps[0], steps[1], distance)
    return Rehearsal(
        parameters=parameters,
        largest=sum(largest for largest, _ in sizes),
        smallest=sum(smallest for _, smallest in sizes),
        held=held,
        step=step,
        update=update,
        extrapolated=whole > shallow[1],
        seconds=time.perf_counter() - began,
    )


@contextlib.contextmanager
def fake_world(size: int) -> Iterator[World]:
    """Hold a process group of `size` ranks, of which this process is rank 0 and the others do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = World(
        torch.device("cpu")
    )  # before the group: agreement with ranks that do nothing would be none
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def with_layers(run: RunConfig, layers: int) -> RunConfig:
    """Return a run whose model has another number of layers."""
    return replace(run, model=replace(run.model, num_hidden_layers=layers))


def sharded(run: RunConfig, layout: Layout) -> GLM:
    """Return the model of a run on the meta device, sharded as a run shards it."""
    with torch.device("meta"):
        model = GLM(run.model)
    model.dtype = getattr(torch, run.dtype)
    model.recompute = run.recompute
    meshes = build_meshes(layout, "cpu")
    shard(model, meshes, run.parallel)
    for module in model.modules():
        if isinstance(module, MoE) and isinstance(module.dispatcher, AllToAllDispatcher):
            module.dispatcher.force_balanced = True
    return model


def numbers_on_ranks(parameter: Tensor) -> tuple[int, int]:
    """Return how many numbers of a parameter the rank with most and the one with least hold."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(parameter, DTensor):
        return parameter.numel(), parameter.numel()
    largest = list(parameter.shape)
    smallest = list(parameter.shape)
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            ranks = parameter.device_mesh.size(axis)
            part = -(-largest[placement.dim] // ranks)  # as torch.chunk cuts
            smallest[placement.dim] = max(0, smallest[placement.dim] - part * (ranks - 1))
            largest[placement.dim] = part
    return math.prod(largest), math.prod(smallest)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(local(tensor).numel() * tensor.itemsize for tensor in tensors)


def track_update(run: RunConfig, model: GLM, phase: Phase) -> Update:
    """Clip gradients without numbers and update a sharded model, and watch."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, Watch() as watch, dispatch.stand_ins(STAND_INS):
        model.to_empty(device="cpu")
        optimizer = Muon(model, run.optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        watch.begin()
        guarded_step(model, optimizer, 0.0, phase.optimizer.clip_norm, Guard())
        return Update(watch.peak, _counted(watch))


def track(run: RunConfig, layout: Layout, phase: Phase, world: World) -> Step:
    """Run two micro-batches on tensors without numbers, and watch."""
    model = sharded(run, layout)
    workers = parallelize(model, world=world, meshes=build_meshes(layout, "cpu"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, Watch() as watch, dispatch.stand_ins(STAND_INS):
        model.to_empty(device="cpu")
        optimizer = Muon(model, run.optimizer)  # whose state takes memory
        held = watch.held
        batch = batch_of(run, layout, phase)
        watch.begin()
        accumulate(model, batch, phase, phase.mtp_weight(0), workers)
        microbatch = _counted(watch)
        watch.begin()  # gradients of the first micro-batch are there
        accumulate(model, batch, phase, phase.mtp_weight(0), workers)
        peak = watch.peak
        optimizer.zero_grad()
        return Step(held, peak, microbatch)


def batch_of(run: RunConfig, layout: Layout, phase: Phase) -> Batch:
    """Return a batch of one micro-batch on each rank: rows of zeros, packed where the stage packs documents."""
    length = phase.sequence_length
    rows = max(1, run.optimizer.microbatch_tokens // length) * layout.data_groups
    tokens_BS = torch.zeros(rows, length, dtype=torch.int64)
    mask_BS = torch.ones(rows, length, dtype=torch.bool)
    stage = dict(run.stages.items())[phase.name]
    if stage.packing == Packing.TRUNCATE:
        return Batch(tokens_BS, mask_BS)
    documents_BS = torch.zeros(rows, length, dtype=torch.int32)
    return Batch(tokens_BS, mask_BS, documents_BS, torch.zeros_like(tokens_BS))


def _counted(watch: Watch) -> Collectives:
    return {kind: (watch.counts[kind], watch.bytes[kind]) for kind in watch.counts}


def extrapolate(first: Step, second: Step, distance: float) -> Step:
    """Continue two depths to a third, `distance` times as far from the first as the second is."""

    def number(a: float, b: float) -> int:
        return round(a + distance * (b - a))

    def collectives(a: Collectives, b: Collectives) -> Collectives:
        return {
            kind: (number(a[kind][0], b[kind][0]), number(a[kind][1], b[kind][1])) for kind in b
        }

    return Step(
        held=number(first.held, second.held),
        peak=number(first.peak, second.peak),
        collectives=collectives(first.collectives, second.collectives),
    )


def render(found: Rehearsal, usable: float) -> str:
    """Format a rehearsal as text. usable: bytes of a GPU's memory for the run."""
    held, step, update = found.held, found.step, found.update
    peak = max(step.peak, update.peak)
    depth = "extrapolated from two depths" if found.extrapolated else "at its own depth"
    lines = [
        f"  {found.parameters:,} parameters, on a rank {found.largest:,} at most and {found.smallest:,} at least",
        f"  weights {size(held.weights, 'B')}, optimizer {size(held.optimizer, 'B')} (exact)",
        f"  peak of a micro-batch {size(step.peak, 'B')}, of the optimizer {size(update.peak, 'B')} "
        f"({depth}); usable {size(usable, 'B')}{'' if peak <= usable else ': it does not fit'}",
    ]
    for name, collectives in (("micro-batch", step.collectives), ("optimizer", update.collectives)):
        for kind, (count, moved) in sorted(collectives.items(), key=lambda item: -item[1][1]):
            what = f"{kind.name} over {kind.ranks} ranks"
            lines.append(f"  {name:<12}{what:<32}{count:>6,}{size(moved, 'B'):>12}")
    lines.append(f"  rehearsed in {found.seconds:.0f} s, with equal loads of the experts")
    return "\n".join(lines)
