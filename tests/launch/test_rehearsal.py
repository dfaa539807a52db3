"""The rehearsal against the truth: the same model, sharded over real ranks, with the same step."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.world import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from minglm import GLM
from minglm.config import Layout, ModelConfig, OptimizerConfig, RunConfig, StageConfig, StagesConfig
from minglm.kernels.dispatch import stand_ins
from minglm.launch.fake import CollectiveKind, Watch
from minglm.launch.rehearsal import batch_of, numbers_on_ranks, rehearse, sharded
from minglm.launch.stand_ins import STAND_INS
from minglm.model.moe import MoE
from minglm.optim.muon import Muon
from minglm.parallel import parallelize
from minglm.parallel.local import local
from minglm.parallel.mesh import build_meshes
from minglm.parallel.shard import materialize
from minglm.parallel.world import World
from minglm.train.guard import Guard, guarded_step
from minglm.train.loop import accumulate
from minglm.train.stages import phases

LENGTH = 32


def small_run(layers=2, dtype="float32", recompute=True, **changes):
    """A run with sizes that ranks do not divide evenly: 3 query heads for a key head, 36 units, 44 ids."""
    model = ModelConfig(
        vocab_size=44,
        hidden_size=24,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
        moe_intermediate_size=20,
        n_routed_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    stage = StageConfig("a test", 1000, LENGTH, {"prose": 1.0})
    optimizer = OptimizerConfig(
        batch_tokens_start=256, batch_tokens_end=256, microbatch_tokens=2 * LENGTH
    )
    return RunConfig(
        "small",
        model,
        StagesConfig(*[stage] * 5),
        optimizer=optimizer,
        dtype=dtype,
        recompute=recompute,
        **changes,
    )


def truth(run, layout):
    """What one real rank holds, and the collectives of a micro-batch and of the optimizer."""
    phase = phases(run)[0]
    world = World(torch.device("cpu"))
    meshes = build_meshes(layout, "cpu")
    model = sharded(run, layout)
    for module in model.modules():
        if isinstance(module, MoE) and hasattr(module.dispatcher, "force_balanced"):
            module.dispatcher.force_balanced = False
    materialize(model, torch.device("cpu"), 0)
    optimizer = Muon(model, run.optimizer)
    workers = parallelize(model, world=world, meshes=meshes)
    batch = batch_of(run, layout, phase)
    with Watch() as watch:
        watch.begin()
        accumulate(model, batch, phase, phase.mtp_weight(0), workers)
        microbatch = dict(watch.counts)
        watch.begin()
        guarded_step(model, optimizer, 0.0, phase.optimizer.clip_norm, Guard())
        update = dict(watch.counts)
    parameters = [local(p) for p in model.parameters()]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "rank": dist.get_rank(),
        "numbers": sum(p.numel() for p in parameters),
        "weights": sum(t.numel() * t.itemsize for t in [*parameters, *model.buffers()]),
        "optimizer": sum(local(t).numel() * t.itemsize for t in states),
        "microbatch": microbatch,
        "update": update,
    }


LAYOUTS = [
    Layout(1, 1, 4, 2, 2),
    Layout(1, 2, 2, 1, 1),
    Layout(2, 1, 2, 2, 1),
    Layout(2, 1, 1, 1, 1, interleave=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
def test_bytes_and_collectives_are_those_of_real_ranks(layout):
    """To the byte, and to the collective: what a rank holds, what the fullest and the emptiest do, what a step sends.

    Of every stage of a pipeline, the first rank is compared.
    """
    run = small_run(layers=layout.pp * layout.interleave * 2 if layout.pp > 1 else 2)
    ranks = run_ranks(truth, layout.world, run, layout)
    each = layout.world // layout.pp
    for stage in range(layout.pp):
        real = ranks[stage * each : (stage + 1) * each]
        found = rehearse(run, layout, "general", stage)
        numbers = [rank["numbers"] for rank in real]
        assert (found.largest, found.smallest) == (max(numbers), min(numbers))
        assert found.held.weights == real[0]["weights"]
        assert found.held.optimizer == real[0]["optimizer"]
        for name, there in (("microbatch", found.step), ("update", found.update)):
            counted = {kind: count for kind, (count, _) in there.collectives.items()}
            assert counted == real[0][name], (stage, name)


@pytest.mark.slow
def test_a_deep_pipeline_is_linear_in_the_layers_of_its_stages():
    """Extrapolated from two depths of equal stages, or tracked with its own, [8, 6]; the same to a thousandth of the peak.

    The sum of the loads has the routers of all stages, and of equal ones there would be two fewer.
    """
    import minglm.launch.rehearsal as rehearsal

    layout = Layout(2, 1, 1, 1, 1)
    run = small_run(layers=14, dtype="bfloat16")
    deep = rehearse(run, layout, "general", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "SHALLOW", (2, 20))
        whole = rehearse(run, layout, "general", 1)
    assert deep.extrapolated and not whole.extrapolated
    assert deep.step.held == whole.step.held
    assert deep.step.peak == pytest.approx(whole.step.peak, rel=1e-3)
    loads = CollectiveKind("all-reduce", 2)
    found, expected = deep.step.collectives, whole.step.collectives
    assert found.pop(loads)[0] == expected.pop(loads)[0] and found == expected


def test_a_deep_model_is_linear_in_its_layers():
    """Extrapolated from two depths, or tracked at its own: the same bytes and collectives, to a thousandth of the peak."""
    import minglm.launch.rehearsal as rehearsal

    layout = Layout(1, 1, 4, 2, 1)
    run = small_run(layers=5, dtype="bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "SHALLOW", (1, 2))
        deep = rehearse(run, layout, "general")
        assert deep.extrapolated
        patch.setattr(rehearsal, "SHALLOW", (2, 20))
        whole = rehearse(run, layout, "general")
    assert not whole.extrapolated
    assert deep.step.held == whole.step.held and deep.held == whole.held
    assert deep.step.peak == pytest.approx(whole.step.peak, rel=1e-3)
    assert deep.step.collectives == whole.step.collectives and deep.update == whole.update


@pytest.mark.parametrize("recompute", [False, True])
def test_peak_is_that_of_torchs_tracker(recompute):
    """Byte for byte, on one rank without an MTP layer: torch's tracker takes no module that is called twice in a pass."""
    run = small_run(dtype="bfloat16", recompute=recompute)
    run = replace(run, model=replace(run.model, num_nextn_predict_layers=0))
    phase = phases(run)[0]
    with torch.device("meta"):
        model = GLM(run.model)
    model.dtype = torch.bfloat16
    model.recompute = recompute
    with FakeTensorMode(allow_non_fake_inputs=True), stand_ins(STAND_INS):
        model.to_empty(device="cpu")
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker, Watch() as watch:
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.detach()  # so that it is seen
            batch = batch_of(run, Layout(1, 1, 1, 1, 1), phase)
            watch.begin()
            accumulate(model, batch, phase, 0.0)
            (found,) = tracker.get_tracker_snapshot("peak").values()
    assert watch.peak == found["Total"]


def test_a_rehearsal_warns_of_nothing():
    """What a real run does not warn of, such as a loss that is a view, no rehearsal does."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rehearse(small_run(), Layout(1, 1, 4, 2, 1), "general")


def test_numbers_of_a_tensor_that_is_no_dtensor():
    """Every rank has all of them."""
    assert numbers_on_ranks(torch.zeros(3, 4)) == (12, 12)
