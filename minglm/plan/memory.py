"""Plan what a config costs before it is started: memory, operations, traffic, days (paper Table 1, Figure 3).

Pure arithmetic on the numbers of the config (counts of parameters and FLOPs: `minglm.plan.counts`); no model is built,
so the plan of 355B parameters takes a millisecond.

Weights, gradients and optimizer state are exact where they divide evenly. The rest is *estimated* and marked as such:
activations (counted from what the layers keep for their backward pass), the copies that sharding gathers, traffic, and
time, which is operations over peak speed times a utilisation that you state.

Choices
- Weights, gradients and moments are float32, evenly sharded over all GPUs. Muon keeps one moment of its matrices and
  AdamW two of everything else: a quarter less than AdamW alone.
- Experts are exchanged among `EXPERT_PARALLEL` GPUs, one node; a sequence longer than `optimizer.microbatch_tokens` is
  cut over as many GPUs as it takes. Activations are kept if they fit, else each layer's are recomputed in the backward
  pass, and the plan says so.
- One tenth of the memory is left to the CUDA context, communication buffers and fragmentation.

Which total is "355B"? The body with the MTP layer, without embedding and head, as the note of Table 1 says; Air's
"106B" is the body without MTP. Simplified: pre- and mid-training only; the cost of rollouts depends on how long the
model chooses to think.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from minglm.config.model import ModelConfig
from minglm.config.run import RunConfig
from minglm.config.training import OptimizerConfig
from minglm.plan.counts import (
    attention_counts,
    count_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
    unit_counts,
)

EXPERT_PARALLEL = 8  # GPUs among which experts are exchanged: one node
USABLE = 0.9  # share of a GPU's memory
LOGITS = 5 * 2**27  # bytes of logits that exist at one time, see minglm.kernels.cross_entropy
GIB = 2**30
STATE_TERMS = ("weights", "gradients", "muon", "adamw")  # what more GPUs make smaller
ESTIMATES = ("working copies", "activations", "head", "total")


class OptimizerSplit(NamedTuple):
    """Parameters by the optimizer that trains them; buffers are in neither."""

    muon: int
    adamw: int


class Placement(NamedTuple):
    """The place of a batch on the GPUs."""

    expert_parallel: int
    """GPUs among which experts are exchanged."""
    context_parallel: int
    """GPUs over which a sequence is cut."""
    tokens: int
    """Tokens per GPU and micro-batch."""


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


def _compute_bytes(run: RunConfig) -> int:
    """Return the bytes of a value in the compute dtype."""
    return 2 if run.dtype == "bfloat16" else 4


def _moe_layers(c: ModelConfig) -> int:
    """Count the MoE layers, those of the MTP layers included."""
    return c.num_hidden_layers - c.first_k_dense_replace + c.num_nextn_predict_layers


def placement(run: RunConfig, gpus: int) -> Placement:
    """Place a batch on the GPUs."""
    longest = max(stage.sequence_length for _, stage in run.stages.items())
    microbatch = run.optimizer.microbatch_tokens
    context_parallel = min(gpus, math.ceil(longest / microbatch))
    share_of_row = math.ceil(longest / context_parallel)
    share_of_batch = math.ceil(run.optimizer.batch_tokens_end / gpus)
    # A micro-batch at most, and no more than the GPU's share of the batch, but at least its share of one row.
    tokens = max(min(max(microbatch, share_of_row), share_of_batch), share_of_row)
    return Placement(
        expert_parallel=math.gcd(EXPERT_PARALLEL, gpus),
        context_parallel=context_parallel,
        tokens=tokens,
    )


def _largest_layer(c: ModelConfig, expert_parallel: int) -> int:
    """Count the parameters of the largest layer that one GPU holds whole while it computes that layer."""
    unit = unit_counts(c)
    elsewhere = c.n_routed_experts * unit["expert"] * (1 - 1 / expert_parallel)
    moe = unit["moe"] - elsewhere
    has_moe = c.first_k_dense_replace < c.num_hidden_layers or c.num_nextn_predict_layers
    return int(unit["attention"] + (max(moe, unit["dense"]) if has_moe else unit["dense"]))


def _working_copies(run: RunConfig, gpus: int, expert_parallel: int, recompute: bool) -> int:
    """Estimate the bytes of gathered weights in the compute dtype, and of gradients that are not yet sharded."""
    count = count_parameters(run.model)
    value = _compute_bytes(run)
    layer = _largest_layer(run.model, expert_parallel)
    if gpus > 1:
        two_layers = 2 * value * layer  # the layer in use, and the next one in transfer
        ends = value * (count["embedding"] + count["head"])
        gradient = 4 * layer  # of one layer, before it is sharded
        return two_layers + ends + gradient
    if value == 4:
        return 0  # the float32 weights themselves are used
    return value * (layer if recompute else count["total_with_mtp"])


def _kept_activations(run: RunConfig, recompute: bool) -> int:
    """Estimate the bytes per token that all layers keep for the backward pass."""
    c = run.model
    value = _compute_bytes(run)
    dense = activation_bytes_per_token(c, dense=True, bytes_per_value=value)
    moe = activation_bytes_per_token(c, dense=False, bytes_per_value=value)
    dense_layers = c.first_k_dense_replace
    moe_layers = _moe_layers(c)
    if not recompute:
        return dense_layers * dense + moe_layers * moe
    # The inputs of all layers, and everything of the one that is recomputed.
    inputs = (dense_layers + moe_layers) * c.hidden_size * value
    return inputs + (moe if moe_layers else dense)


def memory(run: RunConfig, gpus: int = 1, recompute: bool = False) -> dict[str, int]:
    """Compute the bytes per GPU by term; the last is total. recompute: keep only the layers' inputs.

    Exact up to rounding: weights (with the routers' selection biases), gradients, muon, adamw. Estimates: working
    copies (in the compute dtype, plus the gradient that is not yet sharded), activations, head (logits of a chunk, and
    the head's gradient while it is computed).
    """
    c = run.model
    count = count_parameters(c)
    split = optimizer_split(c, run.optimizer)
    place = placement(run, gpus)
    logits = min(LOGITS, place.tokens * c.vocab_size * _compute_bytes(run))
    head_gradient = 4 * count["embedding"]
    terms = {
        "weights": 4 * math.ceil(count["total_with_mtp"] / gpus),
        "gradients": 4 * math.ceil((split.muon + split.adamw) / gpus),
        "muon": 4 * math.ceil(split.muon / gpus),
        "adamw": 8 * math.ceil(split.adamw / gpus),
        "working copies": _working_copies(run, gpus, place.expert_parallel, recompute),
        "activations": place.tokens * _kept_activations(run, recompute),
        "head": logits + head_gradient,
    }
    return terms | {"total": sum(terms.values())}


def traffic(run: RunConfig, gpus: int, recompute: bool = False) -> dict[str, int]:
    """Estimate the bytes that a GPU moves per micro-batch, by term.

    gather: every layer's weights before the forward and the backward pass. reduce: its gradients in float32.
    exchange: tokens to their experts and back, forward, backward, and once more when recomputed. context: keys and
    values of the other parts of a sequence, in both passes.
    """
    c = run.model
    place = placement(run, gpus)
    value = _compute_bytes(run)
    experts_gpus = place.expert_parallel
    moe_layers = _moe_layers(c)
    # A GPU gathers all weights but the experts of its neighbours.
    total = count_parameters(c)["total_with_mtp"]
    experts = moe_layers * c.n_routed_experts * unit_counts(c)["expert"]
    held = total - experts + experts // experts_gpus if gpus > 1 else 0
    # One trip: the copies of the tokens that go to experts on other GPUs, of one layer.
    copies = place.tokens * c.num_experts_per_tok
    trip = copies * c.hidden_size * value * (experts_gpus - 1) // experts_gpus
    keys_and_values = (
        place.tokens * (place.context_parallel - 1) * kv_cache_bytes_per_token(c, value)
    )
    return {
        "gather": 2 * value * held,
        "reduce": 4 * held,
        "exchange": (6 if recompute else 4) * moe_layers * trip,
        "context": (3 if recompute else 2) * keys_and_values,
    }


def _refuse(run: RunConfig, gpus: int, usable: float) -> None:
    """Raise the one line that says what does not fit and what would."""
    need = memory(run, gpus, recompute=True)
    shortage = (
        f"{run.name} on --gpus {gpus} needs {need['total'] / GIB:.1f} GiB each, "
        f"{usable / GIB:.1f} are usable"
    )
    for more in (2**i for i in range(1, 17)):
        if more > gpus and memory(run, more, recompute=True)["total"] <= usable:
            raise ValueError(f"{shortage}; use --gpus {more}")
    fixed_terms = [term for term in need if term not in (*STATE_TERMS, "total")]
    largest = max(fixed_terms, key=lambda term: need[term])
    raise ValueError(
        f"{shortage}; more GPUs do not help, its {largest} take {need[largest] / GIB:.1f} GiB: "
        "lower --optimizer.microbatch_tokens or use GPUs with more memory"
    )


def _stage_plans(run: RunConfig, gpus: int, flops_per_second: float) -> list[dict[str, Any]]:
    """Plan the time of each stage, on GPUs that reach `flops_per_second` each."""
    plans = []
    for name, stage in run.stages.items():
        flops = flops_per_token(run.model, stage.sequence_length).total
        plans.append(
            {
                "stage": name,
                "tokens": stage.tokens,
                "sequence_length": stage.sequence_length,
                "flops_per_token": flops,
                "tokens_per_second_per_gpu": flops_per_second / flops,
                "days": stage.tokens * flops / (flops_per_second * gpus) / 86400,
            }
        )
    return plans


def plan(
    run: RunConfig,
    gpus: int = 1,
    gpu_memory_gib: float = 80.0,
    peak_flops: float = 989e12,
    utilisation: float = 0.25,
    dollars_per_gpu_hour: float = 2.0,
) -> dict[str, Any]:
    """Plan a run on `gpus` GPUs: everything above, as a dict that JSON can hold.

    peak_flops: of one GPU in the run's dtype, per second (989e12: H100, bfloat16, dense). utilisation: the share of it
    that training reaches; 0.25 is what good MoE training reports. Raises ValueError, one line, for what cannot fit and
    for impossible numbers.
    """
    positive = {"gpus": gpus, "gpu_memory_gib": gpu_memory_gib, "peak_flops": peak_flops}
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"{name} = {value}: must be positive")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation = {utilisation}: a share of the peak, above 0 and at most 1")
    usable = USABLE * gpu_memory_gib * GIB
    recompute = run.recompute or memory(run, gpus)["total"] > usable
    if recompute and memory(run, gpus, recompute)["total"] > usable:
        _refuse(run, gpus, usable)
    stages = _stage_plans(run, gpus, peak_flops * utilisation)
    days = sum(stage["days"] for stage in stages)
    return {
        "run": run.name,
        "gpus": gpus,
        "gpu_memory_gib": gpu_memory_gib,
        "parameters": count_parameters(run.model),
        "placement": placement(run, gpus)._asdict() | {"recompute": recompute},
        "memory": memory(run, gpus, recompute) | {"usable": int(usable)},
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(run.model),
        "traffic": traffic(run, gpus, recompute),
        "stages": stages,
        "flops": sum(stage["tokens"] * stage["flops_per_token"] for stage in stages),
        "days": days,
        "gpu_hours": days * 24 * gpus,
        "dollars": days * 24 * gpus * dollars_per_gpu_hour,
        "assumed": {
            "peak_flops": peak_flops,
            "utilisation": utilisation,
            "dollars_per_gpu_hour": dollars_per_gpu_hour,
        },
    }


def _size(number: float, unit: str = "") -> str:
    """Format a number with four digits and its thousands: 355B, 32.1B, 512K."""
    billions = "G" if unit else "B"
    for power, letter in ((12, "T"), (9, billions), (6, "M"), (3, "K")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.4g}{letter}{unit}"
    return f"{number:.4g}{unit}"


def render(plan: Mapping[str, Any]) -> str:
    """Format the plan as text, one block per question."""
    count = plan["parameters"]
    place = plan["placement"]
    assumed = plan["assumed"]
    lines = [f"{plan['run']} on {plan['gpus']} x {plan['gpu_memory_gib']:g} GiB"]

    lines += ["", "parameters"]
    lines += [f"  {name:<24}{count[name]:>22,}" for name in count]

    lines += ["", "memory per GPU (* estimate)"]
    for name, size in plan["memory"].items():
        star = "*" if name in ESTIMATES else " "
        lines.append(f"  {name + ' ' + star:<24}{size / GIB:>18.3f} GiB")
    lines.append(
        f"  micro-batch of {place['tokens']:,} tokens, experts over {place['expert_parallel']}, sequences over "
        f"{place['context_parallel']} GPUs, activations {'recomputed' if place['recompute'] else 'kept'}"
    )

    cache = plan["kv_cache_bytes_per_token"]
    moved = ", ".join(f"{name} {_size(size, 'B')}" for name, size in plan["traffic"].items())
    lines += [
        "",
        f"key/value cache           {cache:,} bytes per token in bfloat16",
        f"traffic per micro-batch * {moved}",
    ]

    lines += [
        "",
        f"{'stage':<16}{'tokens':>10}{'length':>10}{'FLOPs/token':>14}{'tokens/s/GPU':>14}{'days':>12}",
    ]
    for stage in plan["stages"]:
        lines.append(
            f"{stage['stage']:<16}{_size(stage['tokens']):>10}{stage['sequence_length']:>10,}"
            f"{_size(stage['flops_per_token']):>14}{stage['tokens_per_second_per_gpu']:>14,.0f}{stage['days']:>12.4g}"
        )

    lines += [
        "",
        f"{plan['flops']:.3g} FLOPs: {plan['days']:.4g} days, {plan['gpu_hours']:,.4g} GPU-hours, "
        f"${plan['dollars']:,.0f}",
        f"assuming {assumed['utilisation']:.0%} of {assumed['peak_flops']:.3g} FLOP/s and "
        f"${assumed['dollars_per_gpu_hour']:g} per GPU-hour",
    ]
    return "\n".join(lines)
