"""Estimate the time of an optimizer step: products, collectives against the speed of links, what binds (paper 2.4).

    seconds of a micro-batch = max(products + exchange + context + stages, gather + reduce + replicas, launches)
    seconds of a step        = (micro-batches + waiting) * that + optimizer     waiting: `minglm.plan.pipeline`
    bound on the MFU         = FLOPs of the model for the tokens of a step / (peak * seconds of the step)

Traffic of weights does not grow with the tokens, and its prefetch hides behind products. Exchanges of tokens
grow with them, and plain collectives do not hide. So the exchange belongs on NVLink (ep within a node), and
each GPU needs enough tokens per forward pass to pay for gathering its weights over the network: for GLM-4.5
on H100s about 8,000.

Everything here is arithmetic on data sheets with the shares of `minglm.plan.gpus`, and *expected*, not
measured. The bound takes experts with equal loads. A run is expected at 0.6 to 0.8 of it (`EXPECTED`), which
is what is left to launch overhead, slower kernels and unequal loads by experience of others: FSDP2 with
expert parallelism, as plain as ours, reports 28 to 34% on H100s with routing that is forced to be balanced
(NeMo Automodel's performance summary). Where routing is real, and the bias has not balanced it yet, the
busiest expert decides: the exchange of one published run took four times as long.

Simplified: pipeline stages take the time of the busiest one, and wait for the states they send; rows are
full; a step has its final size.
"""

import math
from typing import NamedTuple

from minglm.config.model import ModelConfig
from minglm.config.parallel import Layout, TokenExchange
from minglm.config.run import RunConfig
from minglm.plan.counts import attention_counts, count_parameters, flops_per_token, unit_counts
from minglm.plan.gpus import GPU, KERNEL_SHARE
from minglm.plan.layout import (
    Share,
    exchange_seconds,
    gather_seconds,
    group,
    send_seconds,
    share,
)
from minglm.plan.memory import (
    compute_bytes,
    count_moe_layers,
    optimizer_split,
)
from minglm.plan.pipeline import imbalance, waiting, whole_rounds

EXPECTED = (0.6, 0.8)
"""Share of the bound that a run is expected to reach, lowest and highest."""
LAUNCHES = 100
"""Kernels of a layer, forward and backward."""
LAUNCH_SECONDS = 4e-6
"""Time in which the host starts a kernel: a model of narrow layers waits for it."""
MOVED = 40
"""Bytes that the optimizer reads and writes for each parameter it holds: weight, gradient, moments, update."""


class Collective(NamedTuple):
    """One kind of collective of a micro-batch or of the optimizer step."""

    name: str
    axis: str
    ranks: int
    bytes: float
    """That one GPU gets, its own part included."""
    seconds: float


class StepTime(NamedTuple):
    """The parts of an optimizer step, in seconds; products and collectives of one micro-batch."""

    share: Share
    products: float
    collectives: list[Collective]
    microbatch: float
    optimizer: float
    bubble: float
    """That pipeline stages wait for others, in the whole step."""
    total: float
    tokens: int
    """Tokens of the step, on all GPUs."""
    mfu_bound: float
    binds: str
    """What a faster part of would shorten the step most."""


def products_seconds(
    run: RunConfig, layout: Layout, gpu: GPU, sequence_length: int, recompute: bool
) -> float:
    """Estimate the seconds of the matrix products of one micro-batch, on one GPU; of a pipeline, the one with most to do.

    A product whose matrices are narrow moves more bytes than the memory can while it computes: experts of
    width F take 2 D F operations a row for D + F values that are read or written.
    """
    c = run.model
    tokens = share(run, layout, sequence_length).tokens / layout.pp * imbalance(c, layout)
    passes = 4 / 3 if recompute else 1  # forward, backward twice as much, and forward again
    total = passes * tokens * flops_per_token(c, sequence_length).total
    experts = passes * tokens * 6 * count_moe_layers(c) * c.num_experts_per_tok
    experts *= unit_counts(c)["expert"]
    peak = KERNEL_SHARE * gpu.flops
    D = c.hidden_size
    F = c.moe_intermediate_size
    intensity = 2 * D * F / ((D + F) * compute_bytes(run))
    return (total - experts) / peak + experts / min(peak, intensity * gpu.bandwidth)


def collectives(
    run: RunConfig, layout: Layout, gpu: GPU, sequence_length: int, recompute: bool
) -> list[Collective]:
    """List the collectives of one micro-batch on one GPU, those along axes of one rank left out.

    gather: each layer's weights before the forward and the backward pass. reduce: its gradients in float32.
    exchange: tokens to their experts and back, forward and backward, and forward once more when recomputed.
    context: queries, keys and values by heads instead of by positions, and back. replicas: the sum of the
    sharded gradients over all replicas.
    stages: the state of each token, with an MTP layer its next embedding too, to the next stage, and the gradients back.
    """
    c = run.model
    value = compute_bytes(run)
    tokens = share(run, layout, sequence_length).tokens
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    experts = count_moe_layers(c) * c.n_routed_experts * unit_counts(c)["expert"] / layout.pp
    dense = count_parameters(c)["total_with_mtp"] / layout.pp - experts
    local = experts / layout.ep
    gathers = 2 if run.parallel.reshard_after_forward else 1
    passes = 3 if recompute else 2
    trips = 2 * passes * count_moe_layers(c) / layout.pp

    fsdp = group(layout.fsdp, 1, gpu.per_node)
    efsdp = group(layout.efsdp, layout.ep, gpu.per_node)
    replicas = group(layout.dp_replicate, layout.fsdp, gpu.per_node)
    near = group(layout.ep, 1, gpu.per_node)
    context = group(layout.cp, 1, gpu.per_node)

    found = []
    for name, weight in (("gather", gathers * value), ("reduce", 4)):
        for axis, members, size in (("fsdp", fsdp, dense), ("efsdp", efsdp, local)):
            seconds = gather_seconds(weight * size, members, gpu)
            found.append(Collective(name, axis, members.size, weight * size, seconds))
    shard = 4 * (dense / layout.fsdp + local / layout.efsdp)
    seconds = 2 * gather_seconds(shard, replicas, gpu)
    found.append(Collective("replicas", "dp_replicate", replicas.size, 2 * shard, seconds))

    row = c.hidden_size * value
    moved = trips * tokens * rows_of_a_token(run, layout.ep) * row
    seconds = exchange_seconds(moved, near, gpu)
    found.append(Collective("exchange", "ep", near.size, moved, seconds))
    moved = passes * layers / layout.pp * tokens * _attention_width(c, layout.cp) * value
    seconds = exchange_seconds(moved, context, gpu)
    found.append(Collective("context", "cp", context.size, moved, seconds))
    stages = group(layout.pp, layout.world // layout.pp, gpu.per_node)
    vectors = 2 if c.num_nextn_predict_layers else 1
    moved = 2 * layout.interleave * vectors * tokens * c.hidden_size * value
    found.append(Collective("stages", "pp", stages.size, moved, send_seconds(moved, stages, gpu)))
    return [collective for collective in found if collective.ranks > 1]


def _attention_width(c: ModelConfig, cp: int) -> int:
    """Count the values of a token's queries, keys, values and result, of all heads.

    More ranks than key heads copy these.
    """
    width = c.head_dim + (c.v_head_dim if c.kv_lora_rank else c.head_dim)
    copies = max(1, cp // c.num_key_value_heads)
    return width * (c.num_attention_heads + copies * c.num_key_value_heads)


def tensor_parallel_seconds(
    run: RunConfig, layout: Layout, gpu: GPU, sequence_length: int, recompute: bool
) -> float:
    """Estimate what tensor parallelism over the GPUs of a node would add to a micro-batch: why there is none here.

    Each product of a layer would be cut over them, and the states of all their tokens be summed after
    attention and after the MLP, in each pass: a sum is a reduction and a gathering. No other work of the
    layer can hide it, where the gathering of sharded weights hides behind products.
    """
    c = run.model
    node = min(gpu.per_node, layout.fsdp)
    tokens = node * share(run, layout, sequence_length).tokens
    states = tokens * c.hidden_size * compute_bytes(run)
    layers = (c.num_hidden_layers + c.num_nextn_predict_layers) / layout.pp
    sums = 2 * (3 if recompute else 2) * layers
    return sums * 2 * gather_seconds(states, group(node, 1, gpu.per_node), gpu)


def rows_of_a_token(run: RunConfig, ep: int) -> float:
    """Return how often a token travels to its K experts among E, which `ep` ranks divide.

    K times by all-to-alls. DeepEP sends it once to each rank that has any: ep * (1 - C(E - E / ep, K) / C(E,
    K)) for experts that are chosen equally often.
    """
    c = run.model
    E = c.n_routed_experts
    K = c.num_experts_per_tok
    if run.parallel.dispatcher == TokenExchange.ALL_TO_ALL:
        return K
    return ep * (1 - math.comb(E - E // ep, K) / math.comb(E, K))


def newton_schulz_flops(run: RunConfig) -> float:
    """Count the operations that orthogonalise every matrix of Muon once."""
    total = sum(
        count * newton_schulz_step(rows, columns)
        for count, rows, columns in newton_schulz_shapes(run)
    )
    return run.optimizer.newton_schulz_steps * total


def newton_schulz_step(rows: int, columns: int) -> float:
    """Count the operations of a step on one matrix: 4 r r c + 2 r r r for r <= c: X X', its square, the product with X."""
    rows, columns = sorted((rows, columns))
    return 4.0 * rows**2 * columns + 2.0 * rows**3


def newton_schulz_shapes(run: RunConfig) -> list[tuple[int, int, int]]:
    """List the matrices of Muon: how many there are, rows and columns."""
    c = run.model
    D = c.hidden_size
    q_width = c.num_attention_heads * c.head_dim
    kv_width = c.num_key_value_heads * c.head_dim
    shapes: list[tuple[int, int, int]] = []
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    moe = count_moe_layers(c)
    if c.kv_lora_rank:
        # Near enough: all of its projections as one square.
        size = round(math.sqrt(attention_counts(c).matrices))
        shapes.append((layers, size, size))
    else:
        shapes += [(2 * layers, D, q_width), (2 * layers, D, kv_width)]
    shapes.append((3 * moe * c.n_routed_experts, D, c.moe_intermediate_size))
    if c.n_shared_experts:
        shapes.append((3 * moe, D, c.n_shared_experts * c.moe_intermediate_size))
    shapes.append((3 * c.first_k_dense_replace, D, c.intermediate_size))
    shapes.append((moe, D, c.n_routed_experts))
    shapes.append((c.num_nextn_predict_layers, D, 2 * D))
    return [(count, rows, columns) for count, rows, columns in shapes if count]


def optimizer_seconds(run: RunConfig, layout: Layout, gpu: GPU) -> float:
    """Estimate the seconds of the optimizer: whole matrices to their owner and back, Newton-Schulz, reading and writing."""
    split = optimizer_split(run.model, run.optimizer)
    muon = split.muon / layout.pp
    ranks = layout.pp * layout.fsdp  # replicas repeat the work
    products = newton_schulz_flops(run) / ranks / (KERNEL_SHARE * gpu.flops)
    stored = (split.muon + split.adamw) / ranks
    members = group(layout.efsdp, layout.ep, gpu.per_node)
    trips = 2 * exchange_seconds(4 * muon / layout.fsdp, members, gpu)
    return products + trips + MOVED * stored / gpu.bandwidth


def step_time(
    run: RunConfig, layout: Layout, gpu: GPU, sequence_length: int, recompute: bool
) -> StepTime:
    """Estimate the time of one optimizer step with rows of this length, and what binds it."""
    part = share(run, layout, sequence_length)
    products = products_seconds(run, layout, gpu, sequence_length, recompute)
    found = collectives(run, layout, gpu, sequence_length, recompute)
    spent: dict[str, float] = {}
    for collective in found:
        spent[collective.name] = spent.get(collective.name, 0.0) + collective.seconds
    weights = sum(spent.get(name, 0.0) for name in ("gather", "reduce", "replicas"))
    exposed = sum(spent.get(name, 0.0) for name in ("exchange", "context", "stages"))
    launches = _launch_seconds(run, layout, recompute)
    microbatch = max(products + exposed, weights, launches)
    optimizer = optimizer_seconds(run, layout, gpu)
    bubble = waiting(layout, part.microbatches) * microbatch
    made = whole_rounds(layout, part.microbatches)
    total = made * microbatch + bubble + optimizer

    rows = max(1, round(run.optimizer.batch_tokens_end / sequence_length))
    tokens = rows * sequence_length
    flops = tokens * flops_per_token(run.model, sequence_length).total
    return StepTime(
        share=part,
        products=products,
        collectives=found,
        microbatch=microbatch,
        optimizer=optimizer,
        bubble=bubble,
        total=total,
        tokens=tokens,
        mfu_bound=flops / (layout.world * gpu.flops * total),
        binds=_binds(products, spent, weights, launches, optimizer / part.microbatches),
    )


def _launch_seconds(run: RunConfig, layout: Layout, recompute: bool) -> float:
    """Estimate the seconds in which the host starts all kernels of a micro-batch."""
    layers = (run.model.num_hidden_layers + run.model.num_nextn_predict_layers) / layout.pp
    return (4 / 3 if recompute else 1) * layers * LAUNCHES * LAUNCH_SECONDS


def _binds(
    products: float, spent: dict[str, float], weights: float, launches: float, optimizer: float
) -> str:
    """Say what takes longest."""
    exposed = products + sum(spent.get(name, 0.0) for name in ("exchange", "context", "stages"))
    if launches > max(weights, exposed):
        return "starting kernels"
    if weights > exposed:
        return "gathering weights"
    parts = {
        "products": products,
        "exchange of tokens": spent.get("exchange", 0.0),
        "sharing sequences": spent.get("context", 0.0),
        "sending states": spent.get("stages", 0.0),
        "optimizer": optimizer,
    }
    return max(parts, key=lambda name: parts[name])
