"""Estimate the memory of one GPU, term by term (paper Table 1, Figure 3).

Pure arithmetic on the numbers of the config (counts of parameters: `minglm.plan.counts`); no model is built,
so the plan of 355B parameters takes milliseconds.

Weights, gradients and optimizer state are exact where they divide evenly. The rest is *estimated* and marked
as such: activations (counted from what the layers keep for their backward pass), buffers of the exchange of
tokens, and the copies that sharding gathers. `minglm launch --dry-run` builds the real model and tracks the
real step instead.

Terms are added up as if all were held at one time, which they are not: the head's are gone when the largest
layer is computed. So the total is somewhat high: 44.0 GiB for GLM-4.5 on 512 GPUs with rows of 131,072, where
the rehearsal tracks 39.2.

Choices
- Weights, gradients and moments are float32, evenly sharded over `fsdp` ranks. Muon keeps one moment of its matrices and
  AdamW two of everything else: a quarter less than AdamW alone.
- Activations are kept if they fit, else each layer's are recomputed in the backward pass, and the plan says so.
- One tenth of the memory is left to the CUDA context, communication buffers and fragmentation.

Which total is "355B"? The body with the MTP layer, without embedding and head, as the note of Table 1 says;
Air's "106B" is the body without MTP.
"""

import math
from typing import NamedTuple

from minglm.config.model import ModelConfig
from minglm.config.parallel import Layout
from minglm.config.run import RunConfig
from minglm.config.training import OptimizerConfig
from minglm.plan.counts import attention_counts, count_parameters, unit_counts
from minglm.plan.gpus import GPU, USABLE
from minglm.plan.layout import share
from minglm.plan.pipeline import divide_layers, first_layers, kept

LOGITS = 5 * 2**27  # bytes of logits that exist at one time, see minglm.kernels.cross_entropy
GIB = 2**30
STATE_TERMS = ("weights", "gradients", "muon", "adamw")  # what more GPUs make smaller
ESTIMATES = ("working copies", "activations", "exchange", "head", "total")


class OptimizerSplit(NamedTuple):
    """Parameters by the optimizer that trains them; buffers are in neither."""

    muon: int
    adamw: int


def optimizer_split(c: ModelConfig, optimizer: OptimizerConfig) -> OptimizerSplit:
    """Count the parameters that Muon trains (matrices) and that AdamW trains (embedding, head, norms, biases).

    The rule is that of `minglm.model.parameters`, whose counts a test compares: this module imports no model.
    """
    count = count_parameters(c)
    D = c.hidden_size
    mtp_layers = c.num_nextn_predict_layers
    layers = c.num_hidden_layers + mtp_layers
    # Vectors: two norms and attention's own in each layer, the last norm, and three norms in an MTP layer.
    layer_vectors = 2 * D + attention_counts(c).vectors
    vectors = layers * layer_vectors + D + mtp_layers * 3 * D
    # Buffers: a selection bias for each expert of each MoE layer.
    moe_layers = c.num_hidden_layers - c.first_k_dense_replace + mtp_layers
    buffers = moe_layers * c.n_routed_experts
    matrices = count["body_with_mtp"] - vectors - buffers
    others = vectors + count["embedding"]
    if optimizer.muon_output_head:
        return OptimizerSplit(muon=matrices + count["head"], adamw=others)
    return OptimizerSplit(muon=matrices, adamw=others + count["head"])


def activation_bytes_per_token(c: ModelConfig, dense: bool, bytes_per_value: int) -> int:
    """Estimate the bytes that one layer keeps for its backward pass, per token. dense: its FFN is dense.

    Counted from the layers' code, for rows too long for their attention weights to be kept.
    """
    attention = _attention_activations(c)
    if dense:
        feed_forward = 4 * c.intermediate_size  # four values per unit
        return (attention + feed_forward) * bytes_per_value

    shared_expert = 4 * c.moe_intermediate_size * c.n_shared_experts
    # Of each of the K copies: the sorted input and both pre-activations.
    routed_experts = c.num_experts_per_tok * (c.hidden_size + 2 * c.moe_intermediate_size)
    values = attention + routed_experts + shared_expert
    # The router works in float32 and int64, whatever the dtype of the layer: scores, and weights and indices of K.
    router_bytes = 12 * c.n_routed_experts + 24 * c.num_experts_per_tok
    if bytes_per_value < 4:
        router_bytes += 4 * c.hidden_size  # its input, cast to float32
    return values * bytes_per_value + router_bytes


def _attention_activations(c: ModelConfig) -> int:
    """Count the values that attention and the layer's two norms keep, per token."""
    norms = 4 * c.hidden_size
    q_width = c.num_attention_heads * c.head_dim
    if c.kv_lora_rank:
        latents = c.q_lora_rank + c.kv_lora_rank
        value_width = c.num_attention_heads * c.v_head_dim
        return norms + 2 * (latents + q_width + value_width)
    kv_width = c.num_key_value_heads * c.head_dim
    copies = 3 if c.use_qk_norm else 2  # of queries, and of keys and values
    return norms + copies * (q_width + kv_width)


def compute_bytes(run: RunConfig) -> int:
    """Return the bytes of a value in the compute dtype."""
    return 2 if run.dtype == "bfloat16" else 4


def count_moe_layers(c: ModelConfig) -> int:
    """Count the MoE layers, those of the MTP layers included."""
    return c.num_hidden_layers - c.first_k_dense_replace + c.num_nextn_predict_layers


def _largest_layer(c: ModelConfig, ep: int) -> int:
    """Count the parameters of the largest layer that one GPU holds whole while it computes that layer."""
    unit = unit_counts(c)
    elsewhere = c.n_routed_experts * unit["expert"] * (1 - 1 / ep)
    moe = unit["moe"] - elsewhere
    return int(
        unit["attention"] + (max(moe, unit["dense"]) if count_moe_layers(c) else unit["dense"])
    )


def largest_stage(c: ModelConfig, layout: Layout) -> float:
    """Return the share of all parameters that the rank of the pipeline with most holds."""
    if layout.pp == 1:
        return 1.0
    count = count_parameters(c)
    unit = unit_counts(c)
    layer_norms = 2 * c.hidden_size
    of_layers = [
        unit["attention"]
        + layer_norms
        + (unit["dense"] if layer < c.first_k_dense_replace else unit["moe"])
        for layer in range(c.num_hidden_layers)
    ]
    division = divide_layers(c, layout.pp * layout.interleave)
    of_stages = [sum(of_layers[layer] for layer in own) for own in division]
    of_stages[0] += count["embedding"]
    of_stages[-1] += count["head"] + count["mtp"] + c.hidden_size
    of_ranks = [sum(of_stages[rank :: layout.pp]) for rank in range(layout.pp)]
    return max(of_ranks) / count["total_with_mtp"]


def _working_copies(run: RunConfig, layout: Layout, recompute: bool) -> int:
    """Estimate the bytes of gathered weights in the compute dtype, and of gradients that are not yet sharded."""
    count = count_parameters(run.model)
    value = compute_bytes(run)
    layer = _largest_layer(run.model, layout.ep)
    if layout.fsdp > 1:
        two_layers = 2 * value * layer  # the layer in use, and the next one in transfer
        ends = value * (count["embedding"] + count["head"])
        gradient = (
            value + 4
        ) * layer  # of one layer, as computed, and in float32 before it is sharded
        return two_layers + ends + gradient
    if value == 4:
        return 0  # the float32 weights themselves are used
    return value * (layer if recompute else count["total_with_mtp"])


def _kept_activations(run: RunConfig, share: float, recompute: bool) -> float:
    """Estimate the bytes per token that the layers of one GPU keep for the backward pass.

    share: of all layers. Each rank of a pipeline has a part of them, and keeps it for several micro-batches.
    """
    c = run.model
    value = compute_bytes(run)
    dense = activation_bytes_per_token(c, dense=True, bytes_per_value=value)
    moe = activation_bytes_per_token(c, dense=False, bytes_per_value=value)
    dense_layers = c.first_k_dense_replace
    if not recompute:
        return share * (dense_layers * dense + count_moe_layers(c) * moe)
    # The inputs of all layers, and everything of the one that is recomputed.
    inputs = (dense_layers + count_moe_layers(c)) * c.hidden_size * value
    return share * inputs + (moe if count_moe_layers(c) else dense)


def exchange_bytes(run: RunConfig, tokens: int) -> int:
    """Count the bytes of one trip: the copies of `tokens` tokens that go to their experts, in one layer."""
    c = run.model
    return tokens * c.num_experts_per_tok * c.hidden_size * compute_bytes(run)


def memory(
    run: RunConfig, layout: Layout, sequence_length: int, recompute: bool = False
) -> dict[str, int]:
    """Compute the bytes of one GPU by term; the last is total. recompute: keep only the layers' inputs.

    Exact up to rounding: weights (with the routers' selection biases), gradients, muon, adamw. Estimates:
    working copies (in the compute dtype, plus the gradient that is not yet sharded), activations, exchange
    (tokens on their way to experts and back), head (logits of a chunk, and the head's gradient while it is
    computed).
    """
    c = run.model
    count = count_parameters(c)
    split = optimizer_split(c, run.optimizer)
    part = share(run, layout, sequence_length)
    tokens = part.tokens
    logits = min(LOGITS, tokens * c.vocab_size * compute_bytes(run))
    head_gradient = 4 * count["embedding"]
    held = largest_stage(c, layout)
    ranks = layout.fsdp
    layers = kept(layout, part.microbatches) * first_layers(c, layout)
    activations = _kept_activations(run, layers, recompute)
    terms = {
        "weights": 4 * math.ceil(count["total_with_mtp"] * held / ranks),
        "gradients": 4 * math.ceil((split.muon + split.adamw) * held / ranks),
        "muon": 4 * math.ceil(split.muon * held / ranks),
        "adamw": 8 * math.ceil(split.adamw * held / ranks),
        "working copies": _working_copies(run, layout, recompute),
        "activations": round(tokens * activations),
        # Sent and received, on the way there and on the way back.
        "exchange": 4 * exchange_bytes(run, tokens) if layout.ep > 1 else 0,
        "head": logits + head_gradient,
    }
    return terms | {"total": sum(terms.values())}


class Fit(NamedTuple):
    """The memory of one GPU in one stage."""

    memory: dict[str, int]
    recompute: bool
    fits: bool


def fit(run: RunConfig, layout: Layout, gpu: GPU, sequence_length: int) -> Fit:
    """Return the memory of one GPU, with activations recomputed where the run says so or they would not fit."""
    usable = USABLE * gpu.memory_gib * GIB
    recompute = run.recompute
    terms = memory(run, layout, sequence_length, recompute)
    if terms["total"] > usable and not recompute:
        recompute = True
        terms = memory(run, layout, sequence_length, recompute)
    return Fit(terms, recompute, terms["total"] <= usable)
