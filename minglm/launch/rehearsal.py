"""Rehearse a run without a GPU: the whole world in one process, the real model, sharding and step, no numbers (no section).

    fake world of N ranks  ->  model on the meta device  ->  shard  ->  one step on tensors without numbers

What is real: the meshes, the sharding, the dispatcher, the loop, the pipeline's schedule, clipping and the
optimizer, all that a rank executes, seen from the first rank, and from the first one of the last stage. What
is not: numbers, and the kernels of a GPU, for which `minglm.launch.stand_ins` keep as much memory. So the
bytes of parameters and optimizer are exact, collectives are those of a real step, and the peak is that of
PyTorch's tensors: without NCCL's buffers, fragmentation, and gathers that run ahead.

The passes of a deep model are extrapolated from two shallow ones: every layer after the dense ones is the
same, so memory and collectives are linear in their number. In a pipeline the stages become shallow, and
equally so. Sharding and optimizer are those of the whole model.

Experts have equal loads (the dispatcher's `force_balanced`). Tokens are exchanged by all-to-alls also where a
run would use DeepEP, whose kernels are no collectives of torch.distributed.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minglm.config import Layout, Packing, RunConfig, TokenExchange
from minglm.data.packing import Batch
from minglm.kernels import dispatch
from minglm.launch.fake import CollectiveKind, Watch
from minglm.launch.stand_ins import STAND_INS
from minglm.model.decoder import DecoderLayer
from minglm.model.glm import GLM
from minglm.model.moe import MoE
from minglm.model.mtp import MTPLayer
from minglm.optim.muon import Muon
from minglm.parallel import parallelize
from minglm.parallel.dispatcher import AllToAllDispatcher
from minglm.parallel.local import local
from minglm.parallel.mesh import build_meshes
from minglm.parallel.pipeline import own_model
from minglm.parallel.shard import shard
from minglm.parallel.world import World
from minglm.plan.text import size
from minglm.train.guard import Guard, guarded_step
from minglm.train.loop import Phase, accumulate
from minglm.train.stages import phases

SHALLOW = (3, 4)
"""MoE layers of the two models whose steps are tracked; in a pipeline, of each stage. Fewer have another peak."""


class Held(NamedTuple):
    """Bytes of one rank between two steps."""

    weights: int
    """Parameters and buffers."""
    optimizer: int


Collectives = dict[CollectiveKind, tuple[int, int]]
"""Number and bytes of collectives by kind."""


class Step(NamedTuple):
    """What a micro-batch of one depth takes; in a pipeline, as many as fill it."""

    held: int
    """Bytes between two steps."""
    peak: int
    """Most bytes during a micro-batch, gradients of an earlier one included."""
    collectives: Collectives
    """Of these micro-batches."""


class Update(NamedTuple):
    """What clipping and the optimizer take, at the depth of the model."""

    peak: int
    """Most bytes, gradients included."""
    collectives: Collectives


class Rehearsal(NamedTuple):
    """The result of a rehearsal, seen from the first rank that has the same layers."""

    parameters: int
    """Of the layers of these ranks, without buffers: all layers where there is no pipeline."""
    largest: int
    """Parameters on the rank of them that has most."""
    smallest: int
    """Parameters on the one that has least: where sizes do not divide evenly, the last one."""
    held: Held
    microbatches: int
    """Whose step was tracked."""
    step: Step
    update: Update
    extrapolated: bool
    seconds: float
    """That the rehearsal took."""


def rehearse(run: RunConfig, layout: Layout, stage: str, pipeline_rank: int = 0) -> Rehearsal:
    """Rehearse a stage of pre- or mid-training in a layout, seen from a rank of the pipeline."""
    began = time.perf_counter()
    phase = next(phase for phase in phases(run) if phase.name == stage)
    with fake_world(layout, pipeline_rank) as world:
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
        stages = layout.pp * layout.interleave
        whole = decoder_layers(model) / layout.interleave  # of each stage, on the average
        shallow = [run.model.first_k_dense_replace + layers for layers in SHALLOW]
        if whole <= shallow[1]:
            step = track(run, layout, phase, world)
        else:
            steps = [
                track(with_layers(run, stages * layers), layout, phase, world, even(stages, layers))
                for layers in shallow
            ]
            distance = (whole - shallow[0]) / (shallow[1] - shallow[0])
            step = extrapolate(steps[0], steps[1], distance)
    return Rehearsal(
        parameters=parameters,
        largest=sum(largest for largest, _ in sizes),
        smallest=sum(smallest for _, smallest in sizes),
        held=held,
        microbatches=filling(layout),
        step=step,
        update=update,
        extrapolated=whole > shallow[1],
        seconds=time.perf_counter() - began,
    )


def filling(layout: Layout) -> int:
    """Return micro-batches that fill a pipeline, so that a rank keeps as many as it ever does."""
    return layout.pp if layout.interleave == 1 else 2 * layout.pp


def decoder_layers(model: GLM) -> int:
    """Count the decoder layers that are in this process, MTP layers left out."""
    own = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]
    return sum(not isinstance(layer, MTPLayer) for layer in own)


@contextlib.contextmanager
def fake_world(layout: Layout, pipeline_rank: int = 0) -> Iterator[World]:
    """Hold a process group of all ranks, of which this process is the first of a stage and the others do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = World(
        torch.device("cpu")
    )  # before the group: agreement with ranks that do nothing would be none
    rank = pipeline_rank * (layout.world // layout.pp)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        yield world
    finally:
        dist.destroy_process_group()
        clear_cache()  # DTensor would find the groups of this world again in the next one


def clear_cache() -> None:
    """Let DTensor forget what it worked out of each operation, of which the meshes are a part."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def with_layers(run: RunConfig, layers: int) -> RunConfig:
    """Return a run whose model has another number of layers."""
    return replace(run, model=replace(run.model, num_hidden_layers=layers))


def even(stages: int, layers: int) -> list[range]:
    """Return the layers of each stage where all have so many."""
    return [range(stage * layers, (stage + 1) * layers) for stage in range(stages)]


def sharded(run: RunConfig, layout: Layout, division: Sequence[range] | None = None) -> GLM:
    """Return the model of a run on the meta device, sharded as a run shards it. division: as in `PipelineGLM`."""
    meshes = build_meshes(layout, "cpu")
    model = own_model(run.model, meshes, division)
    model.dtype = getattr(torch, run.dtype)
    model.recompute = run.recompute
    shard(model, meshes, replace(run.parallel, dispatcher=TokenExchange.ALL_TO_ALL))
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


def track(
    run: RunConfig,
    layout: Layout,
    phase: Phase,
    world: World,
    division: Sequence[range] | None = None,
) -> Step:
    """Run the micro-batches of a batch on tensors without numbers, and watch; gradients of earlier ones are there.

    division: as in `PipelineGLM`.
    """
    model = sharded(run, layout, division)
    workers = parallelize(model, world=world, meshes=build_meshes(layout, "cpu"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, Watch() as watch, dispatch.stand_ins(STAND_INS):
        model.to_empty(device="cpu")
        optimizer = Muon(model, run.optimizer)  # whose state takes memory
        held = watch.held
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        batch = batch_of(run, layout, phase)
        watch.begin()
        accumulate(model, batch, phase, phase.mtp_weight(0), workers)
        step = Step(held, watch.peak, _counted(watch))
        optimizer.zero_grad()
        return step


def batch_of(run: RunConfig, layout: Layout, phase: Phase) -> Batch:
    """Return a batch of one micro-batch on each rank, or of those that fill a pipeline: rows of zeros.

    They are packed where the stage packs documents.
    """
    length = phase.sequence_length
    rows = max(1, run.optimizer.microbatch_tokens // length) * layout.data_groups
    rows *= filling(layout)
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
    passes = "micro-batch" if found.microbatches == 1 else f"{found.microbatches} of them"
    for name, collectives in ((passes, step.collectives), ("optimizer", update.collectives)):
        for kind, (count, moved) in sorted(collectives.items(), key=lambda item: -item[1][1]):
            what = f"{kind.name} over {kind.ranks} ranks"
            lines.append(f"  {name:<12}{what:<32}{count:>6,}{size(moved, 'B'):>12}")
    lines.append(f"  rehearsed in {found.seconds:.0f} s, with equal loads of the experts")
    return "\n".join(lines)
