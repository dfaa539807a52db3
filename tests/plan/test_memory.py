"""The planner's estimates: where a batch lies on the GPUs, what it gathers, exchanges and keeps, and how that is printed.

The expected numbers are worked out here from the released shapes of GLM-4.5, not with the planner's functions.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import ModelConfig, OptimizerConfig, RunConfig, StageConfig, StagesConfig
from minglm.config import load_config as load
from minglm.plan.counts import flops_per_token
from minglm.plan.memory import (
    GIB,
    Placement,
    activation_bytes_per_token,
    memory,
    optimizer_split,
    placement,
    plan,
    render,
    traffic,
)

GLM45 = load(Path(__file__).parent.parent.parent / "configs" / "glm45_355b.py")

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


def run_of(length=16, microbatch=64, batch=64, model=TINY, lengths=(), **changes):
    """Return a run whose stages have rows of this length, or of these lengths."""
    stages = [StageConfig("a test", 1000, row, {"prose": 1.0}) for row in lengths or [length] * 5]
    optimizer = OptimizerConfig(
        batch_tokens_start=batch, batch_tokens_end=batch, microbatch_tokens=microbatch
    )
    return RunConfig("small", model, StagesConfig(*stages), optimizer=optimizer, **changes)


@pytest.mark.parametrize(
    ("length", "microbatch", "batch", "gpus", "expected"),
    [
        (16, 64, 64, 1, (1, 1, 64)),  # one GPU: a micro-batch
        (16, 64, 64, 4, (4, 1, 16)),  # its share of the batch is less than a micro-batch
        (16, 64, 64, 12, (4, 1, 16)),  # but a row at least; 4 divides both 8 and 12
        (10, 1000, 1000, 3, (1, 1, 334)),  # a share is rounded up
        (100, 30, 1000, 8, (8, 4, 30)),  # a row of 100 is cut over 4 GPUs
        (100, 30, 1000, 3, (1, 3, 34)),  # over all 3, with more than a micro-batch on each
        (100, 30, 1000, 64, (8, 4, 25)),  # as little as a share of one row
        (90, 30, 1000, 64, (8, 3, 30)),
        (91, 30, 1000, 64, (8, 4, 23)),
        (16, 64, 64, 16, (8, 1, 16)),
    ],
)
def test_where_a_batch_lies(length, microbatch, batch, gpus, expected):
    """GPUs that share the experts, GPUs that share a row, tokens of each in a micro-batch."""
    assert placement(run_of(length, microbatch, batch), gpus) == expected


def test_the_longest_stage_decides_where_a_batch_lies():
    """Whichever stage it is."""
    run = run_of(lengths=(4, 8, 100, 50, 50), microbatch=30, batch=1000)
    assert placement(run, 8) == Placement(8, 4, 30)


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


@pytest.mark.parametrize(("gpus", "shared_by"), [(2, 2), (12, 4), (512, 8)])
@pytest.mark.parametrize("recompute", [False, True])
def test_traffic_of_glm45(gpus, shared_by, recompute):
    """Weights twice, float32 gradients once; tokens to their experts and back; keys and values of the other parts."""
    moved = traffic(GLM45, gpus, recompute)
    row_over = min(gpus, 8)
    tokens = 131_072 // row_over
    elsewhere = (MOE_LAYERS + MTP_LAYERS) * (EXPERTS - EXPERTS // shared_by) * EXPERT
    assert moved["gather"] == 2 * BFLOAT16 * (EVERYTHING - elsewhere)
    assert moved["reduce"] == FLOAT32 * (EVERYTHING - elsewhere)
    trip = tokens * CHOSEN * D * BFLOAT16 * (shared_by - 1) // shared_by
    assert moved["exchange"] == (6 if recompute else 4) * (MOE_LAYERS + MTP_LAYERS) * trip
    keys_and_values = 92 * 2 * 8 * 128 * BFLOAT16  # of a token
    assert moved["context"] == (3 if recompute else 2) * tokens * (row_over - 1) * keys_and_values


@given(st.sampled_from(["float32", "bfloat16"]), st.booleans())
def test_one_gpu_moves_nothing(dtype, recompute):
    """Whatever the run."""
    assert not any(traffic(run_of(dtype=dtype), 1, recompute).values())


def test_copies_that_glm45_holds_beside_its_shards():
    """Two layers, embedding and head in bfloat16, and the float32 gradient of one layer; a node shares the experts."""
    layer = ATTENTION + EXPERTS // 8 * EXPERT + EXPERT + ROUTER
    ends = 2 * VOCABULARY * D
    expected = 2 * BFLOAT16 * layer + BFLOAT16 * ends + FLOAT32 * layer
    assert memory(GLM45, 512, recompute=True)["working copies"] == expected


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
    assert memory(run)["weights"] == FLOAT32 * TINY_ALL
    half = replace(run, dtype="bfloat16")
    for recompute, parameters in ((False, TINY_ALL), (True, TINY_ATTENTION + TINY_MOE)):
        assert memory(run, recompute=recompute)["working copies"] == 0
        copies = memory(half, recompute=recompute)["working copies"]
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
    copies = memory(run, recompute=True)["working copies"]
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
    assert memory(run)["activations"] == 64 * kept
    one = moe if moe_layers else dense
    again = (dense_layers + moe_layers) * 32 * size + one
    assert memory(run, recompute=True)["activations"] == 64 * again


def test_the_head_holds_a_chunk_of_logits_and_its_gradient():
    """Logits of the micro-batch, at most 640 MiB of them."""
    run = run_of(model=tiny())
    assert memory(run)["head"] == 64 * 64 * FLOAT32 + FLOAT32 * 64 * 32
    half = replace(run, dtype="bfloat16")
    assert memory(half)["head"] == 64 * 64 * BFLOAT16 + FLOAT32 * 64 * 32
    assert memory(GLM45, 512)["head"] == 640 * 2**20 + FLOAT32 * VOCABULARY * D


def test_state_is_rounded_up_to_whole_numbers_on_each_gpu():
    """Seven GPUs share numbers that seven does not divide: the fullest of them counts."""
    run = run_of(model=tiny())
    split = optimizer_split(run.model, run.optimizer)
    planned = memory(run, 7)
    trained = split.muon + split.adamw
    for name, count, size in (
        ("weights", TINY_ALL, 4),
        ("gradients", trained, 4),
        ("muon", split.muon, 4),
        ("adamw", split.adamw, 8),
    ):
        assert planned[name] == size * -(-count // 7), name


def test_activations_are_kept_as_long_as_they_fit():
    """Recomputed from the byte on where they no longer fit into nine tenths of the memory, or where the run asks."""
    run = run_of(model=tiny())
    for spare, recompute in ((1.001, False), (0.999, True)):
        gib = spare * memory(run)["total"] / 0.9 / GIB
        assert plan(run, gpu_memory_gib=gib)["placement"]["recompute"] is recompute
    assert plan(replace(run, recompute=True))["placement"]["recompute"] is True
    least = memory(run, recompute=True)["total"] / 0.9 / GIB
    assert plan(run, gpu_memory_gib=1.001 * least)
    with pytest.raises(ValueError, match=r"^small on --gpus 1 needs 0\.0 GiB each"):
        plan(run, gpu_memory_gib=0.999 * least)


@pytest.mark.parametrize(("gpus", "remedy"), [(100, 128), (64, 128), (127, 128), (8, 65_536)])
def test_the_remedy_is_the_smallest_power_of_two_that_fits(gpus, remedy):
    """With the memory that it needs and no more; up to 65,536 GPUs are tried."""
    just_enough = (1 + 1e-6) * memory(GLM45, remedy, recompute=True)["total"] / 0.9 / GIB
    with pytest.raises(ValueError, match=rf"on --gpus {gpus} needs .*; use --gpus {remedy}$"):
        plan(GLM45, gpus=gpus, gpu_memory_gib=just_enough)
    assert plan(GLM45, gpus=remedy, gpu_memory_gib=just_enough)


def test_two_gpus_are_the_first_remedy():
    """For what one GPU cannot hold."""
    run = run_of(model=tiny(), microbatch=1, batch=16)
    state = sum(memory(run, recompute=True)[name] for name in ("weights", "gradients", "muon"))
    with pytest.raises(ValueError, match=r"use --gpus 2$"):
        plan(run, gpu_memory_gib=(memory(run, recompute=True)["total"] - state / 9) / 0.9 / GIB)


def test_where_more_gpus_do_not_help_the_largest_term_is_named():
    """Of those that stay as they are; the state of 131,072 GPUs is not tried."""
    too_little = memory(GLM45, 131_072, recompute=True)["total"] / 0.9 / GIB
    with pytest.raises(ValueError, match="more GPUs do not help, its activations"):
        plan(GLM45, gpus=512, gpu_memory_gib=too_little)
    need = memory(GLM45, 512, recompute=True)
    with pytest.raises(ValueError) as refusal:
        plan(GLM45, gpus=512, gpu_memory_gib=16)
    assert str(refusal.value) == (
        f"glm45_355b on --gpus 512 needs {need['total'] / 2**30:.1f} GiB each, 14.4 are usable; "
        f"more GPUs do not help, its activations take {need['activations'] / 2**30:.1f} GiB: "
        "lower --optimizer.microbatch_tokens or use GPUs with more memory"
    )


def test_time_and_money_are_operations_over_speed():
    """Each stage with the operations of its own rows; days of all GPUs, hours of each, dollars for those."""
    planned = plan(GLM45, gpus=512, peak_flops=1e15, utilisation=0.5, dollars_per_gpu_hour=3.0)
    total = 0.0
    for planned_stage, (name, stage) in zip(planned["stages"], GLM45.stages.items(), strict=True):
        flops = flops_per_token(GLM45.model, stage.sequence_length).total
        seconds = stage.tokens * flops / (512 * 0.5e15)
        assert planned_stage == {
            "stage": name,
            "tokens": stage.tokens,
            "sequence_length": stage.sequence_length,
            "flops_per_token": flops,
            "tokens_per_second_per_gpu": pytest.approx(0.5e15 / flops),
            "days": pytest.approx(seconds / 86_400),
        }
        total += seconds
    assert planned["days"] == pytest.approx(total / 86_400)
    assert planned["gpu_hours"] == pytest.approx(512 * total / 3600)
    assert planned["dollars"] == pytest.approx(3.0 * 512 * total / 3600)
    assert planned["flops"] == pytest.approx(total * 512 * 0.5e15)


@pytest.mark.parametrize("good", [{"utilisation": 1}, {"gpus": 4096}, {"peak_flops": 1e-3}])
def test_numbers_at_the_edge_of_what_is_possible(good):
    """A utilisation of 1, and any positive number."""
    assert plan(GLM45, **{"gpus": 512} | good)


def test_the_default_is_an_h100_at_a_quarter_of_its_peak_for_two_dollars():
    """What `plan` assumes where nothing is said."""
    planned = plan(GLM45, gpus=512)
    assert planned["assumed"] == {
        "peak_flops": 989e12,
        "utilisation": 0.25,
        "dollars_per_gpu_hour": 2.0,
    }
    assert planned["memory"]["usable"] == 72 * GIB
    assert plan(run_of(model=tiny()))["gpus"] == 1


PRINTED = """\
  weights                              2.596 GiB
  adamw                                0.023 GiB
  activations *                       18.907 GiB
  usable                              72.000 GiB
  micro-batch of 16,384 tokens, experts over 8, sequences over 8 GPUs, activations recomputed
  body_with_mtp                  355,234,006,336
key/value cache           376,832 bytes per token in bfloat16
traffic per micro-batch * gather 238.1GB, reduce 238.1GB, exchange 634.2GB, context 129.7GB
stage               tokens    length   FLOPs/token  tokens/s/GPU        days
general                15T     4,096        232.3B         1,064       318.6
repository            500B    32,768        428.9B           576       19.61
long_agent            100B   131,072        1.103T           224       10.08
5.65e+24 FLOPs: 516.5 days, 6.347e+06 GPU-hours, $12,694,225
assuming 25% of 9.89e+14 FLOP/s and $2 per GPU-hour
"""


def test_the_plan_is_printed_in_readable_units():
    """GiB with three digits, counts with their thousands, sizes with four digits; estimates have a star."""
    lines = render(plan(GLM45, gpus=512)).splitlines()
    assert lines[0] == "glm45_355b on 512 x 80 GiB"
    for line in PRINTED.splitlines():
        assert line in lines, line
    small = render(plan(run_of(model=tiny())))
    assert "gather 0B" in small and "activations kept" in small
    assert f"{'general':<16}{'1K':>10}" in small
