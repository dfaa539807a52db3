"""The planner's estimates: where a batch lies on the GPUs, what it gathers, exchanges and keeps, and how that is printed.

The expected numbers are worked out here from the released shapes of GLM-4.5, not with the planner's functions.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import ModelConfig, OptimizerConfig, RunConfig, StageConfig, StagesConfig
from minglm.config import load_config as load
from minglm.config.parallel import Layout
from minglm.model.glm import GLM
from minglm.parallel.pipeline import PipelineGLM
from minglm.plan.counts import flops_per_token
from minglm.plan.gpus import GPUS
from minglm.plan.layout import share, shared_by
from minglm.plan.memory import (
    GIB,
    activation_bytes_per_token,
    largest_stage,
    memory,
    optimizer_split,
)
from minglm.plan.speed import EXPECTED, LAUNCH_SECONDS, LAUNCHES, collectives, step_time
from minglm.plan.summary import plan, search
from minglm.plan.text import render

CONFIG = Path(__file__).parent.parent.parent / "configs" / "glm45_355b.py"
GLM45 = load(CONFIG)

H100 = GPUS["h100"]
ONE = Layout(1, 1, 1, 1, 1)

# Shapes of the released GLM-4.5.
D, VOCABULARY = 5120, 151_552
DENSE_LAYERS, MOE_LAYERS, MTP_LAYERS = 3, 89, 1
EXPERTS, CHOSEN = 160, 8
EXPERT = 3 * D * 1536
ATTENTION = 136_329_472
ROUTER = EXPERTS * (D + 1)
BFLOAT16, FLOAT32 = 2, 4
EVERYTHING = 356_785_898_816
MICROBATCH = 16_384
TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    moe_intermediate_size=24,
    n_routed_experts=8,
    num_experts_per_tok=2,
)


def on(gpus, ep=1, cp=1):
    """Return the layout of this many ranks that shards everything over all of them."""
    return Layout(1, 1, gpus, ep, cp)


def run_of(length=16, microbatch=64, batch=64, model=TINY, lengths=(), **changes):
    """Return a run whose stages have rows of this length, or of these lengths."""
    stages = [StageConfig("a test", 1000, row, {"prose": 1.0}) for row in lengths or [length] * 5]
    optimizer = OptimizerConfig(
        batch_tokens_start=batch, batch_tokens_end=batch, microbatch_tokens=microbatch
    )
    return RunConfig("small", model, StagesConfig(*stages), optimizer=optimizer, **changes)


@pytest.mark.parametrize(
    ("length", "microbatch", "batch", "layout", "expected"),
    [
        (16, 64, 64, on(1), (64, 1)),  # one GPU: a micro-batch
        (16, 64, 64, on(4), (16, 1)),  # its share of the batch is less than a micro-batch
        (16, 64, 256, on(2), (64, 2)),  # or more
        (16, 64, 64, on(16), (16, 1)),  # but a row at least
        (10, 1000, 1000, on(3), (340, 1)),  # 34 of 100 rows: a share is rounded up
        (100, 30, 1000, on(8, cp=4), (25, 5)),  # a row of 100 over 4 GPUs, 10 rows over 2 groups
        (
            100,
            30,
            1000,
            on(8, cp=2),
            (50, 3),
        ),  # more than a micro-batch: a row cannot be cut further
        (100, 60, 1000, on(4, cp=4), (25, 10)),  # whole rows are counted, not their parts
        (
            16,
            64,
            256,
            Layout(2, 2, 2, 1, 1),
            (64, 1),
        ),  # stages work on the same rows, replicas do not
    ],
)
def test_what_a_gpu_computes(length, microbatch, batch, layout, expected):
    """Tokens of a micro-batch, and micro-batches of a step."""
    part = share(run_of(length, microbatch, batch), layout, length)
    assert (part.tokens, part.microbatches) == expected and part.cp == layout.cp


@pytest.mark.parametrize(
    ("length", "layout", "expected"),
    [
        (30, on(8), 1),  # fits one GPU
        (31, on(8), 2),
        (30, on(8, cp=2), 2),  # never fewer than the layout says
        (100, on(8), 4),
        (1000, on(8), 4),  # as many as there are query heads
        (1000, on(2), 2),  # and GPUs
        (100, on(3), 1),  # three do not divide the heads
    ],
)
def test_how_many_share_a_row(length, layout, expected):
    """Until its part is a micro-batch of 30, as far as 4 query heads and 2 key heads can be divided."""
    assert shared_by(run_of(length, microbatch=30, batch=1000), layout, length) == expected


def test_muon_and_adamw_share_the_parameters_of_glm45():
    """Matrices, and the rest: embedding, head, four kinds of vectors; selection biases have no optimizer."""
    attention_vectors = (96 + 2 * 8) * 128 + 2 * 128  # biases of q, k, v; QK-norm
    layers = DENSE_LAYERS + MOE_LAYERS + MTP_LAYERS
    vectors = layers * (2 * D + attention_vectors) + D + 3 * D
    embedding = VOCABULARY * D
    buffers = (MOE_LAYERS + MTP_LAYERS) * EXPERTS
    split = optimizer_split(GLM45.model, GLM45.optimizer)
    assert split.adamw == 2 * embedding + vectors
    assert split.muon == EVERYTHING - 2 * embedding - vectors - buffers
    with_head = optimizer_split(GLM45.model, replace(GLM45.optimizer, muon_output_head=True))
    assert (with_head.muon - split.muon, split.adamw - with_head.adamw) == (embedding, embedding)


@pytest.mark.parametrize(
    "layout", [on(2, 2), on(16, 4, 2), on(512, 8), on(512, 8, 8), on(512, 1, 16)]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_traffic_of_glm45(layout, recompute):
    """Weights twice, float32 gradients once; tokens to their experts and back; heads for positions and back."""
    moved = {
        (found.name, found.axis): found.bytes
        for found in collectives(GLM45, layout, H100, 131_072 if layout.cp > 1 else 4096, recompute)
    }
    experts = (MOE_LAYERS + MTP_LAYERS) * EXPERTS * EXPERT
    for name, weight in (("gather", 2 * BFLOAT16), ("reduce", FLOAT32)):
        assert moved[name, "fsdp"] == weight * (EVERYTHING - experts)
        if layout.efsdp > 1:
            assert moved[name, "efsdp"] == weight * experts / layout.ep
    tokens = 131_072 // layout.cp if layout.cp > 1 else MICROBATCH
    trips = 2 * (3 if recompute else 2) * (MOE_LAYERS + MTP_LAYERS)
    if layout.ep > 1:
        assert moved["exchange", "ep"] == trips * tokens * CHOSEN * D * BFLOAT16
    if layout.cp > 1:
        keys = 2 * 8 * max(1, layout.cp // 8)  # keys and values of 8 heads, copied for more ranks
        width = (2 * 96 + keys) * 128  # queries and results
        passes = (3 if recompute else 2) * 93
        assert moved["context", "cp"] == passes * tokens * width * BFLOAT16


def test_replicas_sum_their_shards():
    """Twice the float32 gradients that one GPU holds."""
    (found,) = [
        c
        for c in collectives(GLM45, Layout(1, 2, 256, 8, 1), H100, 4096, True)
        if c.name == "replicas"
    ]
    assert found.bytes == pytest.approx(2 * FLOAT32 * EVERYTHING / 256) and found.ranks == 2


@given(st.sampled_from(["float32", "bfloat16"]), st.booleans())
def test_one_gpu_moves_nothing(dtype, recompute):
    """Whatever the run."""
    assert not collectives(run_of(dtype=dtype), ONE, H100, 16, recompute)


@pytest.mark.parametrize(("pp", "interleave"), [(1, 1), (2, 1), (2, 3), (4, 1), (3, 2)])
def test_the_largest_stage_is_that_of_the_real_stages(pp, interleave):
    """Number by number, buffers included: of the rank of the pipeline that holds most."""
    model = replace(GLM45.model, num_hidden_layers=9, hidden_size=64, vocab_size=1000)
    held = []
    with torch.device("meta"):
        for rank in range(pp):
            stages = PipelineGLM(model, rank, pp, interleave) if pp > 1 else GLM(model)
            held.append(sum(t.numel() for t in [*stages.parameters(), *stages.buffers()]))
    found = largest_stage(model, Layout(pp, 1, 1, 1, 1, interleave))
    assert found == pytest.approx(max(held) / sum(held), rel=1e-9)


@pytest.mark.parametrize(("recompute", "passes"), [(False, 3), (True, 4)])
@pytest.mark.parametrize("mtp", [0, 1, 2])
def test_a_tiny_model_waits_for_its_kernels(recompute, passes, mtp):
    """Its time is that of starting the kernels of each layer, MTP layers too, and of one pass more if it recomputes."""
    run = run_of(model=replace(TINY, num_nextn_predict_layers=mtp))
    found = step_time(run, ONE, H100, 16, recompute)
    assert found.binds == "starting kernels"
    layers = TINY.num_hidden_layers + mtp
    assert found.microbatch == pytest.approx(passes / 3 * layers * LAUNCHES * LAUNCH_SECONDS)


def test_copies_that_glm45_holds_beside_its_shards():
    """Two layers, embedding and head in bfloat16, the gradient of one layer in both; a node shares the experts."""
    layer = ATTENTION + EXPERTS // 8 * EXPERT + EXPERT + ROUTER
    ends = 2 * VOCABULARY * D
    expected = 2 * BFLOAT16 * layer + BFLOAT16 * ends + (BFLOAT16 + FLOAT32) * layer
    assert memory(GLM45, on(512, 8), 4096, recompute=True)["working copies"] == expected


TINY_ATTENTION = 32 * (4 + 2 * 2) * 16 + 4 * 16 * 32 + 2 * 16
TINY_DENSE = 3 * 32 * 96
TINY_MOE = 9 * 3 * 32 * 24 + 8 * 33  # eight experts and a shared one, router and selection biases
TINY_MTP = 2 * 32 * 32 + 3 * 32 + TINY_ATTENTION + 2 * 32 + TINY_MOE
TINY_ENDS = 2 * 64 * 32
TINY_ALL = 2 * (TINY_ATTENTION + 2 * 32) + TINY_DENSE + TINY_MOE + 32 + TINY_MTP + TINY_ENDS


def tiny(**changes):
    """Return the small model without biases, with QK-norm and one MTP layer, or with other values."""
    values = {"attention_bias": False, "use_qk_norm": True, "num_nextn_predict_layers": 1}
    return replace(TINY, **{**values, **changes})


def test_copies_on_one_gpu():
    """None in float32; in bfloat16 every weight, or one layer at a time when it is computed again."""
    run = run_of(model=tiny())
    assert memory(run, ONE, 16)["weights"] == FLOAT32 * TINY_ALL
    half = replace(run, dtype="bfloat16")
    for recompute, parameters in ((False, TINY_ALL), (True, TINY_ATTENTION + TINY_MOE)):
        assert memory(run, ONE, 16, recompute=recompute)["working copies"] == 0
        copies = memory(half, ONE, 16, recompute=recompute)["working copies"]
        assert copies == BFLOAT16 * parameters


@pytest.mark.parametrize(
    ("changes", "ffn"),
    [
        ({}, TINY_MOE),
        ({"intermediate_size": 900}, 3 * 32 * 900),  # the dense layer is the larger one
        ({"first_k_dense_replace": 2}, TINY_MOE),  # the MTP layer has experts
        ({"first_k_dense_replace": 2, "num_nextn_predict_layers": 0}, TINY_DENSE),
        ({"num_nextn_predict_layers": 0}, TINY_MOE),
    ],
)
def test_the_largest_layer_is_computed_whole(changes, ffn):
    """It has experts, or a wide dense FFN, or there are no experts at all."""
    run = run_of(model=tiny(**changes), dtype="bfloat16")
    copies = memory(run, ONE, 16, recompute=True)["working copies"]
    assert copies == BFLOAT16 * (TINY_ATTENTION + ffn)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("dense_layers", "mtp"), [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)])
def test_activations_are_those_of_each_layer_or_of_one_and_the_inputs(dtype, dense_layers, mtp):
    """All layers keep theirs; recomputed, each keeps its input, and one at a time everything."""
    model = tiny(first_k_dense_replace=dense_layers, num_nextn_predict_layers=mtp)
    run = run_of(model=model, dtype=dtype)
    size = BFLOAT16 if dtype == "bfloat16" else FLOAT32
    dense, moe = (activation_bytes_per_token(model, kind, size) for kind in (True, False))
    moe_layers = 2 - dense_layers + mtp
    kept = dense_layers * dense + moe_layers * moe
    assert memory(run, ONE, 16)["activations"] == 64 * kept
    one = moe if moe_layers else dense
    again = (dense_layers + moe_layers) * 32 * size + one
    assert memory(run, ONE, 16, recompute=True)["activations"] == 64 * again


def test_the_head_holds_a_chunk_of_logits_and_its_gradient():
    """Logits of the micro-batch, at most 640 MiB of them."""
    run = run_of(model=tiny())
    assert memory(run, ONE, 16)["head"] == 64 * 64 * FLOAT32 + FLOAT32 * 64 * 32
    half = replace(run, dtype="bfloat16")
    assert memory(half, ONE, 16)["head"] == 64 * 64 * BFLOAT16 + FLOAT32 * 64 * 32
    assert memory(GLM45, on(512, 8), 4096)["head"] == 640 * 2**20 + FLOAT32 * VOCABULARY * D


def test_state_is_rounded_up_to_whole_numbers_on_each_gpu():
    """Seven GPUs share numbers that seven does not divide: the fullest of them counts."""
    run = run_of(model=tiny())
    split = optimizer_split(run.model, run.optimizer)
    planned = memory(run, on(7), 16)
    trained = split.muon + split.adamw
    for name, count, size in (
        ("weights", TINY_ALL, 4),
        ("gradients", trained, 4),
        ("muon", split.muon, 4),
        ("adamw", split.adamw, 8),
    ):
        assert planned[name] == size * -(-count // 7), name


def test_the_exchange_holds_tokens_four_times():
    """Sent and received, on the way to the experts and back; nothing where all experts are here."""
    terms = memory(GLM45, on(512, 8), 4096, recompute=True)
    assert terms["exchange"] == 4 * MICROBATCH * CHOSEN * D * BFLOAT16
    assert memory(GLM45, on(512), 4096, recompute=True)["exchange"] == 0


def with_memory(gib):
    """Return an H100 with this much memory."""
    return replace(H100, memory_gib=gib)


def test_activations_are_kept_as_long_as_they_fit():
    """Recomputed from the byte on where they no longer fit into nine tenths of the memory, or where the run asks."""
    run = run_of(model=tiny())
    for spare, recompute in ((1.001, False), (0.999, True)):
        gib = spare * memory(run, ONE, 16)["total"] / 0.9 / GIB
        planned = plan(run, with_memory(gib))
        assert [stage["recompute"] for stage in planned["stages"]] == [recompute] * 5
    assert plan(replace(run, recompute=True), H100)["stages"][0]["recompute"] is True
    least = memory(run, ONE, 16, recompute=True)["total"] / 0.9 / GIB
    assert plan(run, with_memory(1.001 * least))["fits"]
    planned = plan(run, with_memory(0.999 * least))
    assert not planned["fits"] and planned["refusal"].startswith(
        "small on 1 GPU of kind h100 needs 0.0"
    )


@pytest.mark.parametrize("gpus", [8, 64, 100])
def test_the_remedy_is_the_smallest_power_of_two_that_fits(gpus):
    """In some layout: the one that it names."""
    planned = plan(GLM45, H100, gpus)
    remedy = int(planned["refusal"].partition("--gpus ")[2].split()[0])
    assert remedy == 128 and search(GLM45, H100, 128) and not search(GLM45, H100, 64)


def test_where_more_gpus_do_not_help_the_largest_term_is_named():
    """Of those that stay as they are."""
    planned = plan(replace(GLM45, recompute=True), with_memory(16), 512)
    worst = planned["stages"][0]["memory"]
    assert planned["refusal"] == (
        f"glm45_355b on 512 GPUs of kind h100 needs {worst['total'] / 2**30:.1f} GiB each in stage general, 14.4 are "
        f"usable; more GPUs do not help, its activations take {worst['activations'] / 2**30:.1f} GiB: "
        "lower --optimizer.microbatch_tokens or use GPUs with more memory"
    )


def test_time_and_money_are_operations_over_speed():
    """Each stage with the operations of its own rows; days of all GPUs, hours of each, dollars for those."""
    planned = plan(GLM45, H100, 512, dollars=3.0)
    total = [0.0, 0.0]
    for planned_stage, (name, stage) in zip(planned["stages"], GLM45.stages.items(), strict=True):
        flops = flops_per_token(GLM45.model, stage.sequence_length).total
        bound = planned_stage["mfu_bound"]
        assert planned_stage["name"] == name and planned_stage["flops_per_token"] == flops
        for end, part in enumerate(reversed(EXPECTED)):
            speed = 512 * H100.flops * part * bound
            seconds = stage.tokens * flops / speed
            assert planned_stage["days"][end] == pytest.approx(seconds / 86_400)
            assert planned_stage["tokens_per_day"][1 - end] == pytest.approx(speed / flops * 86_400)
            total[end] += seconds
    for end in (0, 1):
        assert planned["days"][end] == pytest.approx(total[end] / 86_400)
        assert planned["gpu_hours"][end] == pytest.approx(512 * total[end] / 3600)
        assert planned["dollars"][end] == pytest.approx(3.0 * 512 * total[end] / 3600)
    assert planned["flops"] == sum(s["tokens"] * s["flops_per_token"] for s in planned["stages"])


def test_assumptions_are_said():
    """The data sheet, the shares, the routing, and that nothing was measured."""
    assumed = plan(GLM45, H100, 512)["assumed"]
    assert assumed["peak_flops"] == 989e12 and assumed["dollars_per_gpu_hour"] == 2.0
    assert "H100" in assumed["source"] and "equal loads" in assumed["routing"]
    assert assumed["measured"] is False
    assert plan(run_of(model=tiny()), H100)["gpus"] == 1


PRINTED = """\
  weights                              2.596 GiB
  adamw                                0.023 GiB
  activations *                       18.907 GiB
  usable                              72.000 GiB
  micro-batch of 16,384 tokens, whole rows, activations recomputed
  body_with_mtp                  355,234,006,336
serving 8 requests with vLLM or SGLang (estimate; cache 376,832 bytes a token in bfloat16)
bfloat16           131,072      32         664.6     1,472.0
float8               4,096       8         333.8        11.5
layout: --parallel.fsdp 512 --parallel.ep 8  (the config's; efsdp 64)
"""


def test_the_plan_is_printed_in_readable_units():
    """GiB with three digits, counts with their thousands, sizes with four digits; estimates have a star."""
    run = load(f"{CONFIG}:h100x512")
    lines = render(plan(run, H100)).splitlines()
    assert lines[0] == "glm45_355b on 512 x h100 (80 GiB)"
    for line in PRINTED.splitlines():
        assert line in lines, line
    small = render(plan(run_of(model=tiny()), H100))
    assert "activations kept" in small and "gather" not in small
    assert f"{'general':<16}{'1K':>7}" in small
