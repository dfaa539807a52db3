"""A pipeline of stages computes what one process computes: terms, loads, each gradient, and the weights after three steps.

Its passes have the order that the plan simulates.
"""

import pytest
import torch
from helpers.tiny import constant_phase, drawn_batch
from helpers.world import run_ranks
from torch.distributed.pipelining import PipelineStage

from minglm.config import Layout, OptimizerConfig, ParallelConfig
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.parallel import parallelize
from minglm.parallel.gradients import global_norm
from minglm.parallel.mesh import build_meshes
from minglm.parallel.pipeline import PipelineGLM
from minglm.parallel.shard import materialize, shard
from minglm.parallel.workers import gathered
from minglm.parallel.world import World
from minglm.plan.pipeline import Pass, order
from minglm.testing.model import tiny_model
from minglm.train.guard import Guard
from minglm.train.loop import accumulate, step

CPU = torch.device("cpu")


def stage_and_whole(layout, seed):
    """Return this rank's stages, their workers, and the whole model of one process, with the same initial values."""
    config = tiny_model(seed, num_hidden_layers=4, initializer_range=0.3).config
    meshes = build_meshes(layout, "cpu")
    rank = meshes.dense.get_local_rank("pp")
    with torch.device("meta"):
        stage = PipelineGLM(config, rank, layout.pp, layout.interleave)
    shard(stage, meshes, ParallelConfig())
    materialize(stage, CPU, seed)
    return stage, parallelize(stage, world=World(CPU), meshes=meshes), GLM(config, seed)


def compare(layout, cases):
    """Return the largest relative difference of the gradients of each case, and what differs so much."""
    found = []
    for rows, packed, mtp, recompute in cases:
        stage, workers, plain = stage_and_whole(layout, rows)
        stage.recompute = recompute
        phase = constant_phase(balance_weight=0.05, microbatch_tokens=8)
        batch = drawn_batch(rows, rows, 8, packed)
        wanted = accumulate(plain, batch, phase, mtp)
        terms = accumulate(stage, batch, phase, mtp, workers)
        assert torch.equal(terms.tokens_per_expert_LE, wanted.tokens_per_expert_LE)
        differences = {
            name: abs(a - b)
            for name, a, b in zip(terms._fields[:3], terms[:3], wanted[:3], strict=True)
        }
        norm = global_norm(plain)
        differences["norm"] = float((global_norm(stage) - norm).abs() / norm)
        own = dict(stage.named_parameters())
        for name, parameter in plain.named_parameters():
            if name in own:
                assert (own[name].grad is None) == (parameter.grad is None), name
            if name in own and parameter.grad is not None:
                size = torch.maximum(parameter.grad.norm(), norm / 100)
                difference = (gathered(own[name].grad) - parameter.grad).norm() / size
                differences[name] = float(difference)
        worst = max(differences, key=differences.get)
        found.append((differences[worst], worst))
    return found


CASES = [(5, True, 0.3, False), (2, False, 0.3, True), (3, False, 0.0, False)]


LAYOUTS = [Layout(2, 1, 1, 1, 1), Layout(2, 1, 2, 2, 1, interleave=2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_compute_the_gradients_of_one_process(layout):
    """One stage on each rank, or two with experts divided inside each; batches that do not fill the pipeline;
    recomputation. (tests/parallel/test_checkpoints.py trains one stage on each rank with divided experts.)"""
    for found in run_ranks(compare, layout.world, layout, CASES):
        for case, (difference, name) in zip(CASES, found, strict=True):
            assert difference < 2e-6, f"{case}: {name} differs by {difference}"  # float32


def recorded(layout, microbatches):
    """Return the passes of this rank in the order of a real step."""
    stage, workers, _ = stage_and_whole(layout, 0)
    found = []

    def record(name, is_forward):
        original = getattr(PipelineStage, name)

        def method(self, microbatch, *arguments, **options):
            found.append(Pass(is_forward, self.stage_index, microbatch))
            return original(self, microbatch, *arguments, **options)

        setattr(PipelineStage, name, method)

    record("forward_one_chunk", True)
    record("backward_one_chunk", False)
    batch = drawn_batch(1, microbatches, 8, False)
    accumulate(stage, batch, constant_phase(microbatch_tokens=8), 0.0, workers)
    return found


@pytest.mark.parametrize(("interleave", "microbatches"), [(1, 5), (2, 6)])
def test_a_real_step_has_the_order_of_the_plan(interleave, microbatches):
    """Pass by pass, on both ranks."""
    layout = Layout(2, 1, 1, 1, 1, interleave)
    assert run_ranks(recorded, 2, layout, microbatches) == order(layout, microbatches)


def three_steps(layout):
    """Return the largest difference of the weights after three steps from those of one process."""
    stage, workers, plain = stage_and_whole(layout, 1)
    phase = constant_phase(
        balance_weight=0.05, microbatch_tokens=8, learning_rate=0.01, bias_rate=0.01
    )
    ours, theirs = Muon(stage, OptimizerConfig()), Muon(plain, OptimizerConfig())
    guards = Guard(), Guard()
    for seed in range(3):
        batch = drawn_batch(seed, 6, 8, True)
        step(stage, ours, batch, phase, 0, guards[0], workers)
        step(plain, theirs, batch, phase, 0, guards[1])
    with torch.device("meta"):
        whole = GLM(plain.config)
    whole.to_empty(device=CPU)
    workers.gather_into(whole)
    values = whole.state_dict()
    return max(float((values[k] - value).abs().max()) for k, value in plain.state_dict().items())


def test_three_steps_of_a_pipeline_lead_to_the_same_weights():
    """Clipping over all stages, Muon, and the selection bias of each stage; the whole model is gathered from them."""
    # Newton-Schulz magnifies float32's rounding; a wrong rule moves a weight by 2e-3 a step.
    assert max(run_ranks(three_steps, 4, Layout(2, 1, 2, 2, 1, interleave=2))) < 2e-5
