"""Measure what one GPU can show of training at scale, in one script (paper 2.4; no section of its own).

    python -m minglm bench scale configs/mini.py                 about ten minutes on one H100

    training     some hundred steps of a config with the code of many ranks, in a world of one: loss, MFU, peak memory
    checkpoint   one written in the background while the steps go on: how long they wait, how much slower they are
    layer        one MoE layer of GLM-4.5 with the experts that a GPU has with ep = 8, through the dispatcher
    muon         the optimizer's step on the matrices that a GPU owns among all of a layout

Each is beside what `minglm plan` says of it. Nothing here is the speed of a cluster: no byte leaves the GPU.

Choices
- The text is drawn: each token has a few followers, so the loss falls, from log V to the logarithm of their number, without a
  corpus. The router chooses as it does in training; no loads are forced to be equal.
- The layer gets as many rows as a GPU does on the average, 8 for each of its own tokens, all for its own experts. They go
  through the dispatcher's all-to-alls, from the GPU to itself.
- On a CPU with `--smoke` everything is small: that shows only that the script runs.
"""

import contextlib
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minglm.common.device import measured_flops, pick_device, pick_dtype
from minglm.common.log import Log
from minglm.common.threads import threads_in_use
from minglm.common.version import versions
from minglm.config import Layout, ModelConfig, RunConfig
from minglm.data.packing import Batch
from minglm.model.glm import GLM
from minglm.model.layers import MLP
from minglm.model.moe import Dispatcher, Experts, LocalDispatcher
from minglm.optim.muon import Muon
from minglm.parallel import parallelize
from minglm.parallel.dispatcher import AllToAllDispatcher
from minglm.parallel.mesh import build_meshes
from minglm.parallel.shard import materialize, shard
from minglm.parallel.world import World
from minglm.plan.memory import memory
from minglm.plan.speed import newton_schulz_shapes, newton_schulz_step
from minglm.train.checkpoint import CheckpointStore
from minglm.train.loop import LoopOptions, Trainer
from minglm.train.stages import phases

FOLLOWERS = 8
"""Tokens that may follow a token of the drawn text."""
FIRST_FOLLOWER = 11
"""How far the first of them is from the token."""
WARM_UP = 2
"""Turns before those that count."""


class DrawnText:
    """An endless stream of rows; after token t comes one of `FOLLOWERS`, equally likely: the ids from t + 11 to t + 18."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary = vocabulary
        self.length = length
        self.rows = 0

    def next(self, rows: int) -> Batch:
        """Return the next rows."""
        generator = torch.Generator().manual_seed(self.rows)
        self.rows += rows
        B, S = rows, self.length
        first_B1 = torch.randint(self.vocabulary, (B, 1), generator=generator)
        steps_BS = FIRST_FOLLOWER + torch.randint(FOLLOWERS, (B, S), generator=generator)
        tokens_BS = (first_B1 + steps_BS.cumsum(1)) % self.vocabulary
        mask_BS = torch.ones(B, S, dtype=torch.bool)
        mask_BS[:, 0] = False
        return Batch(tokens_BS, mask_BS)

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream is."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.rows = state["rows"]


def scale(
    run: RunConfig, large: RunConfig, device_name: str, steps: int, batch_tokens: int
) -> dict[str, Any]:
    """Measure everything. Return the record.

    run: is trained, for `steps` steps of `batch_tokens` tokens. large: has the layer and the matrices, in its layout.
    """
    record: dict[str, Any] = {
        "bench": "scale",
        "config": run.name,
        "large": large.name,
        "versions": versions(),
    }
    with world_of_one(device_name) as world, tempfile.TemporaryDirectory() as folder:
        dtype = pick_dtype(run.dtype, world.device)
        record["dtype"] = str(dtype).removeprefix("torch.")
        record["products_flops"] = measured_flops(world.device, dtype, threads_in_use())
        trainer = trainer_of(
            run, world, Path(folder), steps, batch_tokens, record["products_flops"]
        )
        record["training"] = train(trainer, run, steps)
        show("training", record["training"])
        record["checkpoint"] = write_while_training(trainer, Path(folder))
        show("checkpoint", record["checkpoint"])
        del trainer
        free(world.device)
        record["layer"] = layer(large, world, dtype, record["products_flops"])
        show("layer", record["layer"])
        free(world.device)
        record["muon"] = muon(large, world.device)
        show("muon", record["muon"])
    return record


def show(name: str, values: dict[str, Any]) -> None:
    """Print one part of the record."""
    print(f"{name}:")
    for key, value in values.items():
        print(f"  {key:<28}{value:,.4g}" if isinstance(value, float) else f"  {key:<28}{value}")


@contextlib.contextmanager
def world_of_one(device_name: str) -> Iterator[World]:
    """Yield a world of one rank with a process group: NCCL's on a GPU."""
    device = pick_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        device_id=device if device.type == "cuda" else None,
    )
    world = World(device)
    try:
        yield world
    finally:
        world.close()


def free(device: torch.device) -> None:
    """Give the GPU's memory back, and forget its peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes that PyTorch has held on the GPU; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def trainer_of(
    run: RunConfig, world: World, folder: Path, steps: int, batch_tokens: int, flops: float
) -> Trainer:
    """Return the training of a sharded model on drawn text: the loop of a run, in a layout of one rank."""
    meshes = build_meshes(run.parallel.layout(1, run.model), world.device.type)
    with torch.device("meta"):
        model = GLM(run.model)
    model.dtype = pick_dtype(run.dtype, world.device)
    model.recompute = run.recompute
    shard(model, meshes, run.parallel)
    materialize(model, world.device, run.seed)
    phase = phases(run)[0]
    length = phase.sequence_length
    rows = max(1, batch_tokens // length)
    warm_up = max(1, steps // 10)
    phase = replace(
        phase,
        tokens=steps * rows * length,
        learning_rate=lambda tokens: (
            run.optimizer.peak_lr * min(1.0, (1 + tokens // (rows * length)) / warm_up)
        ),
        batch_tokens=lambda tokens: rows * length,
    )
    log = Log(folder / "log.jsonl")
    options = LoopOptions(
        quiet=True,
        peak_flops=flops,
        workers=parallelize(model, world=world, meshes=meshes),
    )
    return Trainer(
        model,
        Muon(model, run.optimizer),
        DrawnText(run.model.vocab_size, length),
        phase,
        CheckpointStore(folder, log).stage(phase.name),
        log,
        options,
    )


def train(trainer: Trainer, run: RunConfig, steps: int) -> dict[str, Any]:
    """Train, and return losses, speed and memory beside those of the plan."""
    free(trainer.model.device)
    records = [trainer.step() for _ in range(steps)]
    tenth = max(1, steps // 10)
    length = trainer.phase.sequence_length
    measured = records[min(WARM_UP, steps - 1) :]
    planned_run = replace(
        run,
        optimizer=replace(
            run.optimizer,
            batch_tokens_start=records[0].batch_tokens,
            batch_tokens_end=records[0].batch_tokens,
        ),
    )
    planned = memory(planned_run, Layout(1, 1, 1, 1, 1), length, run.recompute)["total"]
    peak = peak_bytes(trainer.model.device)
    return {
        "steps": steps,
        "tokens_of_a_step": records[0].batch_tokens,
        "loss_of_chance": math.log(run.model.vocab_size),
        "loss_of_the_text": math.log(FOLLOWERS),
        "first_loss": statistics.fmean(record.loss for record in records[:tenth]),
        "last_loss": statistics.fmean(record.loss for record in records[-tenth:]),
        "losses": [round(record.loss, 4) for record in records[:: max(1, steps // 60)]],
        "skipped_steps": sum(record.left_out is not None for record in records),
        "tokens_per_second": statistics.median(r.tokens_per_second for r in measured),
        "mfu": statistics.median(record.mfu or 0.0 for record in measured),
        "routing": "the router's own",
        "load_max_over_mean": max(records[-1].load_max_over_mean or [0.0]),
        "peak_bytes": peak,
        "planned_bytes": planned,
        "peak_over_plan": None if peak is None else peak / planned,
    }


def write_while_training(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Write a checkpoint in the background while the training goes on. Return who waited for how long."""
    seconds = [timed(trainer.step, trainer.model.device) for _ in range(3)]
    began = time.perf_counter()
    trainer.state.save(trainer.checkpoints, background=True)
    copied = time.perf_counter() - began
    during = []
    pending = trainer.checkpoints.writer.pending
    assert pending is not None
    while not during or not pending.done():
        during.append(timed(trainer.step, trainer.model.device))
    trainer.checkpoints.writer.wait()
    written = time.perf_counter() - began
    files = [path for path in trainer.checkpoints.partial.rglob("*") if path.is_file()]
    return {
        "bytes": sum(path.stat().st_size for path in files),
        "seconds_until_training_goes_on": copied,
        "seconds_until_written": written,
        "steps_meanwhile": len(during),
        "seconds_of_a_step_before": statistics.median(seconds),
        "seconds_of_a_step_meanwhile": statistics.median(during),
    }


def layer(run: RunConfig, world: World, dtype: torch.dtype, flops: float) -> dict[str, Any]:
    """Time the experts of one GPU, and a shared one, forward and backward, with the dispatcher and without it."""
    c = run.model
    layout = run.parallel.layout(gpus(run), c)
    own = c.n_routed_experts // layout.ep
    tokens = run.optimizer.microbatch_tokens
    K = min(c.num_experts_per_tok, own)
    tokens = tokens * c.num_experts_per_tok // K
    generator = torch.Generator().manual_seed(0)
    experts_TK = torch.rand(tokens, own, generator=generator).topk(K).indices.to(world.device)
    weights_TK = torch.full((tokens, K), 1 / K, device=world.device)
    x_TD = torch.randn(tokens, c.hidden_size, generator=generator).to(world.device, dtype)
    x_TD.requires_grad_()
    experts, shared = layer_of(c, own, world.device, dtype)
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)

    def turn(dispatcher: Dispatcher) -> Callable[[], None]:
        def once() -> None:
            y_TD = dispatcher(x_TD, experts_TK, weights_TK, experts, shared)
            y_TD.backward(torch.ones_like(y_TD))

        return once

    rows = tokens * K
    work = 3 * 2 * 3 * c.hidden_size * c.moe_intermediate_size * (rows + tokens)
    found: dict[str, Any] = {
        "experts": own,
        "of": c.n_routed_experts,
        "rows": rows,
        "hidden_size": c.hidden_size,
        "moe_intermediate_size": c.moe_intermediate_size,
        "routing": "drawn, each expert as likely",
        "flop": work,
    }
    for name, dispatcher in (
        ("dispatched", AllToAllDispatcher(group, own)),
        ("local", LocalDispatcher()),
    ):
        free(world.device)
        seconds = median_seconds(turn(dispatcher), world.device)
        found[f"{name}_seconds"] = seconds
        found[f"{name}_share_of_products"] = work / seconds / flops
        found[f"{name}_peak_bytes"] = peak_bytes(world.device)
    return found


def layer_of(
    c: ModelConfig, own: int, device: torch.device, dtype: torch.dtype
) -> tuple[Experts, MLP]:
    """Return the experts of one GPU and the shared one, with drawn weights."""
    with torch.device("meta"):
        experts = Experts(replace(c, n_routed_experts=own))
        shared = MLP(c.hidden_size, c.moe_intermediate_size * max(1, c.n_shared_experts))
    for module in (experts, shared):
        module.to_empty(device=device).to(dtype)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return experts, shared


def gpus(run: RunConfig) -> int:
    """Return the GPUs of the layout that a config names; without one, as many as its experts are divided over."""
    parallel = run.parallel
    return parallel.pp * parallel.dp_replicate * (parallel.fsdp or parallel.ep)


def muon(run: RunConfig, device: torch.device) -> dict[str, Any]:
    """Time the optimizer's step on the matrices that one GPU owns among all of a layout."""
    ranks = gpus(run)
    parameters = []
    names = itertools.count()
    for count, rows, columns in newton_schulz_shapes(run):
        own = max(1, round(count / ranks))
        matrices = torch.randn(own, rows, columns, device=device) / math.sqrt(columns)
        parameter = torch.nn.Parameter(matrices)
        parameter.grad = torch.randn_like(matrices)
        parameters.append((f"model.layers.{next(names)}.mlp.experts.gate_EFD", parameter))
    optimizer = Muon(parameters, replace(run.optimizer, muon_head_dim=0))
    seconds = median_seconds(optimizer.step, device)
    work = run.optimizer.newton_schulz_steps * sum(
        len(stack) * newton_schulz_step(*stack.shape[1:]) for _, stack in parameters
    )
    return {
        "ranks": ranks,
        "stacks": [list(parameter.shape) for _, parameter in parameters],
        "flop": work,
        "seconds": seconds,
        "tflops": work / seconds / 1e12,
    }


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, until the GPU has done it."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def median_seconds(work: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Return the median seconds of a call, after a few that do not count."""
    return statistics.median([timed(work, device) for _ in range(WARM_UP + rounds)][WARM_UP:])
