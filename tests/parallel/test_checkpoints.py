"""Checkpoints of many ranks: what one layout wrote, any other reads; a rank that is killed loses nothing."""

import dataclasses
import math
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.tiny import constant_phase
from helpers.world import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from minglm.common.files import read_jsonl
from minglm.common.log import Log
from minglm.common.ranks import Ranks, new_folder_of
from minglm.config import Layout, OptimizerConfig, ParallelConfig, load_config
from minglm.data.mixture import Mixture
from minglm.model.glm import GLM
from minglm.model.hf import write as write_module
from minglm.model.hf.config import to_hf
from minglm.model.hf.files import INDEX, HFOrigin
from minglm.model.hf.write import write, write_stream
from minglm.optim.muon import Muon
from minglm.parallel import parallelize
from minglm.parallel.mesh import build_meshes
from minglm.parallel.pipeline import PipelineGLM
from minglm.parallel.shard import materialize, shard
from minglm.parallel.world import World
from minglm.recipe import convert
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import moments_of, weights_of
from minglm.train.loop import LoopOptions, Trainer


class Division(NamedTuple):
    """How the ranks divide tensors: two axes, over the product of which a matrix is sharded by rows.

    A stack of experts is divided by experts on the second axis, and each expert by rows on the first.
    """

    rows: int
    experts: int

    @property
    def ranks(self):
        """Count the ranks."""
        return self.rows * self.experts


DIVISIONS = [Division(1, 1), Division(2, 1), Division(1, 2), Division(2, 2), Division(4, 1)]


def whole_tensors(shapes):
    """Return the tensors of a small state, as they are in one process: each number occurs once."""
    tensors = {}
    start = 0
    for number, shape in enumerate(shapes):
        size = math.prod(shape)
        tensors[f"model.{number}"] = torch.arange(start, start + size).float().reshape(shape)
        start += size
    return tensors


def divided(tensors, division):
    """Divide tensors among the ranks: matrices by rows, stacks by experts and rows, vectors not at all."""
    if division.ranks == 1:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    dense = init_device_mesh("cpu", (division.ranks,), mesh_dim_names=("fsdp",))
    sparse = init_device_mesh(
        "cpu", (division.rows, division.experts), mesh_dim_names=("efsdp", "ep")
    )
    parts = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 3:
            parts[name] = distribute_tensor(tensor, sparse, (Shard(1), Shard(0)))
        elif tensor.ndim == 2:
            parts[name] = distribute_tensor(tensor, dense, (Shard(0),))
        elif name.endswith("1"):
            parts[name] = distribute_tensor(tensor, sparse, (Replicate(), Replicate()))
        else:
            parts[name] = tensor.clone()
    return parts


def gathered(tensors):
    """Return tensors as one process has them."""
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def save_divided(folder, shapes, division, background):
    """Save a divided state, and overwrite it while it may still be written; return nothing."""
    checkpoints = CheckpointStore(folder).stage("general")
    tensors = divided(whole_tensors(shapes), division)
    checkpoints.save(tensors, {"step": 3, "stream": {"drawn": 0.1}}, background=background)
    for tensor in tensors.values():
        tensor.fill_(-2)
    checkpoints.writer.wait()


def load_divided(folder, shapes, division):
    """Load it in another layout. Return the values, and the whole tensors."""
    whole = {name: torch.full_like(tensor, -1) for name, tensor in whole_tensors(shapes).items()}
    tensors = divided(whole, division)
    values = CheckpointStore(folder).stage("general").load(tensors)
    return values, gathered(tensors)


def in_ranks(function, division, *args):
    """Call a function on the ranks of a layout, or here for a layout of one."""
    return run_ranks(function, division.ranks, *args) if division.ranks > 1 else [function(*args)]


@settings(max_examples=5)
@given(
    writer=st.sampled_from(DIVISIONS),
    reader=st.sampled_from(DIVISIONS),
    shapes=st.lists(
        st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple), min_size=1, max_size=5
    ),
    background=st.booleans(),
)
def test_any_layout_reads_what_any_other_wrote(
    tmp_path_factory, writer, reader, shapes, background
):
    """Every number is where it was, also where some ranks hold nothing of a tensor; plain values are those of rank 0."""
    folder = str(tmp_path_factory.mktemp("run"))
    in_ranks(save_divided, writer, folder, shapes, writer, background)
    expected = whole_tensors(shapes)
    for values, tensors in in_ranks(load_divided, reader, folder, shapes, reader):
        assert values == {"step": 3, "stream": {"drawn": 0.1}, "log_position": 0}
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


SHAPES = [(8, 4), (5,), (), (4, 6, 3)]


def load_a_damaged_one(folder):
    """Load from two ranks; return the error."""
    try:
        load_divided(folder, SHAPES, Division(2, 1))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("rank", [0, 1])
def test_damage_anywhere_is_found_by_all_ranks(tmp_path, rank):
    """A flipped bit in the file of either rank: all ranks raise the same, and none goes on to wait for another."""
    run_ranks(save_divided, 2, str(tmp_path), SHAPES, Division(2, 1), False)
    folder = tmp_path / "checkpoints" / "general" / "partial"
    shard = folder / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for said in run_ranks(load_a_damaged_one, 2, str(tmp_path)):
        assert f"cannot read checkpoint {folder}: " in said and shard.name in said


def stop_in_the_middle(folder, moment):
    """Save twice; rank 1 dies in the middle of the second checkpoint, in the background. Return what rank 0 is told."""
    checkpoints = CheckpointStore(folder).stage("general")
    tensors = divided(whole_tensors(SHAPES), Division(2, 1))
    checkpoints.save(tensors, {"step": 1})
    if dist.get_rank() == 1:
        module, name = moment
        setattr(sys.modules[module], name, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
    checkpoints.save(tensors, {"step": 2}, background=True)
    try:
        checkpoints.writer.wait()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "moment",
    [
        ("minglm.train.checkpoint", "write"),
        ("torch.distributed.checkpoint", "save"),
        ("minglm.train.checkpoint_files", "checksum"),
    ],
)
def test_a_rank_killed_while_it_saves_loses_nothing(tmp_path, moment):
    """Before, while and after it writes its part: the checkpoint before is there and whole, for any number of ranks."""
    with pytest.raises(AssertionError, match="rank"):  # the one that was killed
        run_ranks(stop_in_the_middle, 2, str(tmp_path), moment)
    values, tensors = load_divided(str(tmp_path), SHAPES, Division(1, 1))
    assert values["step"] == 1
    expected = whole_tensors(SHAPES)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


CPU = torch.device("cpu")
ROWS, S = 4, 8
ALONE = Layout(1, 1, 1, 1, 1)
BOTH = Layout(1, 1, 4, 2, 1)  # experts over two ranks, and their rows over two


def train(folder, layout, steps):
    """Train in a layout up to this step, from the last checkpoint; return what this rank has, each tensor whole."""
    documents = [torch.randint(0, 24, (n,), generator=numbers(n)).numpy() for n in (5, 9, 13, 21)]
    stream = Mixture({"a": documents}, {"a": 1.0}, S, "best_fit", seed=3)
    config = tiny_model(1, n_routed_experts=8).config
    meshes = build_meshes(layout, "cpu") if layout.world > 1 else None
    with torch.device("meta"):
        model = GLM(config)
        if layout.pp > 1:
            model = PipelineGLM(
                config, meshes.dense.get_local_rank("pp"), layout.pp, layout.interleave
            )
    workers = None
    if meshes is not None:
        shard(model, meshes, ParallelConfig())
        workers = parallelize(model, world=World(CPU), meshes=meshes)
    materialize(model, CPU, seed=2)
    optimizer = Muon(model.named_parameters(), OptimizerConfig())
    phase = constant_phase(
        tokens=steps * ROWS * S, batch_tokens=ROWS * S, sequence_length=S, learning_rate=1e-2
    )
    writes = layout.world == 1 or dist.get_rank() == 0
    log = Log(f"{folder}/log.jsonl", writes=writes)
    checkpoints = CheckpointStore(folder, log if writes else None).stage("general")
    options = LoopOptions(quiet=True, workers=workers)
    Trainer(model, optimizer, stream, phase, checkpoints, log, options).run()
    return gathered(weights_of(model) | moments_of(model, optimizer))


def trained(folder, *legs):
    """Train in one layout after the other, up to a step each. Return the losses and the state at the end."""
    for layout, steps in legs:
        if layout.world > 1:
            state = {}
            for part in run_ranks(train, layout.world, str(folder), layout, steps):
                state |= part  # a stage of a pipeline has its own layers
        else:
            state = train(str(folder), layout, steps)
    losses = [record["loss"] for record in read_jsonl(folder / "log.jsonl")]
    return losses, state


@pytest.mark.parametrize(
    "layouts",
    [
        (BOTH, ALONE, Layout(2, 1, 2, 1, 1), BOTH),
        (
            Layout(1, 2, 2, 2, 1),
            Layout(1, 1, 4, 4, 1),
            Layout(2, 1, 2, 2, 1),
            Layout(1, 1, 2, 1, 1),
        ),
    ],
)
def test_training_goes_on_in_another_layout(tmp_path, layouts):
    """Each step of four in another layout than the one before: losses, weights and moments are those of one process."""
    legs = [(layout, step) for step, layout in enumerate(layouts, 1)]
    losses, state = trained(tmp_path / "legs", *legs)
    expected_losses, expected = trained(tmp_path / "straight", (ALONE, 4))
    assert losses == pytest.approx(expected_losses, rel=2e-6)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        # Muon divides by the norm of a gradient, which multiplies its rounding.
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_the_same_layout_resumes_bit_for_bit(tmp_path):
    """Two experts' ranks by two: a step and one more are two steps, in every bit."""
    losses, state = trained(tmp_path / "a", (BOTH, 2))
    again_losses, again = trained(tmp_path / "b", (BOTH, 1), (BOTH, 2))
    assert losses == again_losses
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def import_in_ranks(folder):
    """Import a released checkpoint. Return the stage that it is, and a tensor of it."""
    config = dataclasses.replace(load_config("configs/nano.py"), model=tiny_model(1).config)
    convert.SHARD_GIGABYTES = 4e-6
    stage = convert.import_checkpoint(config, f"{folder}/released", f"{folder}/run")
    return stage, CheckpointStore(f"{folder}/run").stored(stage).read("lm_head.weight")


def test_ranks_divide_an_import(tmp_path):
    """Two ranks write what one would: every tensor once, in files of both."""
    model = tiny_model(1)
    model.save_pretrained(tmp_path / "released")
    (stage, head_VD), other_answer = run_ranks(import_in_ranks, 2, str(tmp_path))
    assert stage == other_answer[0]
    assert torch.equal(head_VD, model.lm_head.weight)
    other = tiny_model(2)
    store = CheckpointStore(tmp_path / "run")
    store.restore(stage, weights_of(other))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    shards = list((tmp_path / "run" / "checkpoints" / stage / "final").glob("shard-*"))
    assert len(shards) > 3


def export(folder):
    """Write a released checkpoint by all ranks, from a checkpoint of a run."""
    model = tiny_model(1)
    stored = CheckpointStore(folder).stored("general")
    weights = convert.RunWeights(model.config, HFOrigin(to_hf(model.config), {}), stored)
    ranks = Ranks.of_the_world()
    with new_folder_of(ranks, f"{folder}/released") as temporary:
        write(weights, temporary, "bfloat16", 4e-6, ranks)


@pytest.mark.parametrize("writers", [1, 2])
def test_ranks_divide_an_export(tmp_path, writers):
    """Each file is written by one rank; whatever divided the checkpoint, the folder is that of one process."""
    model = tiny_model(1)
    in_ranks(save_model, Division(writers, 1), str(tmp_path))
    run_ranks(export, 2, str(tmp_path))
    model.save_pretrained(tmp_path / "alone", "bfloat16", 4e-6)
    files = sorted(path.name for path in (tmp_path / "alone").glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(path.name for path in (tmp_path / "released").glob("*.safetensors"))
    for name in (*files, INDEX):
        assert (tmp_path / "released" / name).read_bytes() == (
            tmp_path / "alone" / name
        ).read_bytes()


def save_model(folder):
    """Save a tiny model that the ranks have divided among them."""
    ranks = Ranks.of_the_world()
    tensors = divided(weights_of(tiny_model(1)), Division(ranks.size, 1))
    CheckpointStore(folder).save("general", tensors, {"tokens": 0})


def stream(folder, full_disk):
    """Write a released checkpoint of a sharded model. full_disk: the rank whose disk is full; return the error."""
    model = tiny_model(1)
    meshes = build_meshes(Layout(1, 1, 2, 2, 1), "cpu")
    shard(model, meshes, ParallelConfig())
    workers = parallelize(model, world=World(torch.device("cpu")), meshes=meshes)
    ranks = Ranks.of_the_world()
    path = Path(folder) / "released"
    ranks.first(path.mkdir)
    if ranks.rank == full_disk:
        write_module._write_file = no_space
    try:
        write_stream(model.config, None, workers.weights(), path, "bfloat16", ranks, 4e-6)
    except ValueError as error:
        return str(error)


def no_space(path, tensors):
    """Fail as a full disk does."""
    raise OSError("No space left on device")


def test_a_sharded_model_is_written_tensor_by_tensor(tmp_path):
    """Two ranks write, in files of both, what one process would of the whole model."""
    assert run_ranks(stream, 2, str(tmp_path), None) == [None, None]
    tiny_model(1).save_pretrained(tmp_path / "alone", "bfloat16")
    alone = GLM.from_pretrained(tmp_path / "alone").state_dict()
    streamed = GLM.from_pretrained(tmp_path / "released").state_dict()
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in alone.items())
    assert len(list((tmp_path / "released").glob("*.safetensors"))) > 3


def test_a_full_disk_of_one_rank_ends_the_writing_on_all(tmp_path):
    """None waits for the rank that failed."""
    found = run_ranks(stream, 2, str(tmp_path), 1)
    assert all("No space left" in error for error in found), found
