"""What a config costs before it is started: parameters, memory, operations, traffic, days (paper Table 1, Figure 3).

Pure arithmetic on the numbers of the config; no model is built, so the plan of 355B parameters takes a millisecond.

    attention   D (N + 2 M) A + N A D, biases (N + 2 M) A, QK-norm 2 A         expert   3 D F        dense FFN   3 D I
    MLA         D Q + Q N A + D (L + R) + L N (A - R + V) + N V D, norms Q + L (Q, L latents, R rotate, V of a value)
    MoE block   (E + shared) expert + E D + E        MTP   2 D D + 3 D + one MoE layer        training FLOPs per token
    = 6 * active parameters with the head + 6 N A S a layer for causal attention (2 forward, 4 backward)

Parameters and operations are exact; weights, gradients and optimizer state are exact where they divide evenly. What is
*estimated* is marked so: activations (counted from what the layers keep for their backward pass), the copies that
sharding gathers, traffic, and time, which is operations over peak speed times a utilisation that you state.

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

from minglm.plan.counts import (
    attention_counts,
    count_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
    unit_counts,
)

EXPERT_PARALLEL = 8
USABLE = 0.9
LOGITS = 5 * 2**27  # bytes that exist at one time, see kernels/linear_cross_entropy.py
GIB = 2**30


def optimizer_split(c, optimizer):
    """(parameters trained by Muon, by AdamW) under an OptimizerConfig; buffers are in neither."""
    n, D, L = count_parameters(c), c.hidden_size, c.num_hidden_layers
    mtp, layers = c.num_nextn_predict_layers, L + c.num_nextn_predict_layers
    vectors = layers * (2 * D + attention_counts(c)[1]) + D + mtp * 3 * D
    buffers = (L - c.first_k_dense_replace + mtp) * c.n_routed_experts
    matrices = n["body_with_mtp"] - vectors - buffers
    head = n["head"] * optimizer.muon_output_head
    return matrices + head, vectors + n["embedding"] + n["head"] - head


def activation_bytes_per_token(c, dense, bytes_per_value):
    """Estimate: bytes one layer keeps for its backward pass, per token. `dense`: its FFN is dense.

    Counted from the layers' code, for rows too long for their attention weights to be kept: 4 D around the two norms,
    2 queries and 2 keys and values, one of each more with QK-norm, 4 values per unit of a dense FFN and of the shared
    expert, and for the routed ones the sorted inputs and both pre-activations of each of K copies, scores and indices.
    """
    D, F, E, K, b = (
        c.hidden_size,
        c.moe_intermediate_size,
        c.n_routed_experts,
        c.num_experts_per_tok,
        bytes_per_value,
    )
    heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    kept = (4 * D + (heads + kv_heads) * (2 + c.use_qk_norm)) * b
    if c.kv_lora_rank:
        latents, values = c.q_lora_rank + c.kv_lora_rank, c.num_attention_heads * c.v_head_dim
        kept = (4 * D + 2 * (latents + heads + values)) * b
    if dense:
        return kept + 4 * c.intermediate_size * b
    router = 12 * E + 24 * K + 4 * D * (b < 4)  # it works in float32, on a copy of its input
    return kept + router + K * (D + 2 * F) * b + 4 * F * c.n_shared_experts * b


def placement(run, gpus):
    """How a batch lies on the GPUs: dict of expert_parallel, context_parallel, and tokens per GPU and micro-batch."""
    longest = max(stage.sequence_length for _, stage in run.stages.items())
    context = min(gpus, math.ceil(longest / run.optimizer.microbatch_tokens))
    most = max(run.optimizer.microbatch_tokens, math.ceil(longest / context))
    whole_batch = math.ceil(run.optimizer.batch_tokens_end / gpus)
    tokens = max(min(most, whole_batch), math.ceil(longest / context))
    return {
        "expert_parallel": math.gcd(EXPERT_PARALLEL, gpus),
        "context_parallel": context,
        "tokens": tokens,
    }


def _gathered(c, expert_parallel):
    """Parameters of the largest layer that one GPU holds whole while it computes that layer."""
    u = unit_counts(c)
    moe = u["moe"] - c.n_routed_experts * u["expert"] * (1 - 1 / expert_parallel)
    has_moe = c.first_k_dense_replace < c.num_hidden_layers or c.num_nextn_predict_layers
    return int(u["attention"] + (max(moe, u["dense"]) if has_moe else u["dense"]))


def memory(run, gpus=1, recompute=False):
    """Bytes per GPU by term, as a dict that ends in total. recompute: keep only the layers' inputs.

    Exact up to rounding: weights (with the routers' selection biases), gradients, muon, adamw. Estimates: working
    copies (in the compute dtype, plus the gradient about to be sharded), activations, head (logits of a chunk, the
    head's gradient in the making).
    """
    c, n = run.model, count_parameters(run.model)
    b = 2 if run.dtype == "bfloat16" else 4
    where, (muon, adamw) = placement(run, gpus), optimizer_split(run.model, run.optimizer)
    layer = _gathered(c, where["expert_parallel"])
    if (
        gpus > 1
    ):  # a layer in use, the next on its way, embedding and head; the gradient of a layer before it is shared
        copies = 2 * b * layer + b * (n["embedding"] + n["head"]) + 4 * layer
    else:
        copies = 0 if b == 4 else b * (layer if recompute else n["total_with_mtp"])
    dense, moe = (activation_bytes_per_token(c, dense, b) for dense in (True, False))
    moe_layers = c.num_hidden_layers - c.first_k_dense_replace + c.num_nextn_predict_layers
    if recompute:
        kept = (c.first_k_dense_replace + moe_layers) * c.hidden_size * b + (
            moe if moe_layers else dense
        )
    else:
        kept = c.first_k_dense_replace * dense + moe_layers * moe
    terms = {
        "weights": 4 * math.ceil(n["total_with_mtp"] / gpus),
        "gradients": 4 * math.ceil((muon + adamw) / gpus),
        "muon": 4 * math.ceil(muon / gpus),
        "adamw": 8 * math.ceil(adamw / gpus),
        "working copies": copies,
        "activations": where["tokens"] * kept,
        "head": min(LOGITS, where["tokens"] * c.vocab_size * b) + 4 * n["embedding"],
    }
    return terms | {"total": sum(terms.values())}


def traffic(run, gpus, recompute=False):
    """Estimate: bytes a GPU moves per micro-batch, as a dict.

    gather: every layer's weights before the forward and the backward pass. reduce: its gradients in float32.
    exchange: tokens to their experts and back, forward, backward, and once more when recomputed. context: keys and
    values of the other parts of a sequence, in both passes.
    """
    c, where = run.model, placement(run, gpus)
    b, ep, cp = (
        2 if run.dtype == "bfloat16" else 4,
        where["expert_parallel"],
        where["context_parallel"],
    )
    n, mtp = count_parameters(c), c.num_nextn_predict_layers
    moe_layers = c.num_hidden_layers - c.first_k_dense_replace + mtp
    experts = moe_layers * c.n_routed_experts * unit_counts(c)["expert"]
    held = (n["total_with_mtp"] - experts + experts // ep) * (gpus > 1)
    trips = where["tokens"] * c.num_experts_per_tok * c.hidden_size * b * (ep - 1) // ep
    kv = where["tokens"] * (cp - 1) * kv_cache_bytes_per_token(c, b)
    return {
        "gather": 2 * b * held,
        "reduce": 4 * held,
        "exchange": (6 if recompute else 4) * moe_layers * trips,
        "context": (3 if recompute else 2) * kv,
    }


def _refuse(run, gpus, usable):
    """Raise the one line that says what does not fit and what would."""
    need, state = memory(run, gpus, recompute=True), ("weights", "gradients", "muon", "adamw")
    found = f"{run.name} on --gpus {gpus} needs {need['total'] / GIB:.1f} GiB each, {usable / GIB:.1f} are usable"
    more = next(
        (
            g
            for g in (2**i for i in range(1, 17))
            if g > gpus and memory(run, g, True)["total"] <= usable
        ),
        None,
    )
    if more:
        raise ValueError(f"{found}; use --gpus {more}")
    largest = max((term for term in need if term not in (*state, "total")), key=need.get)
    raise ValueError(
        f"{found}; more GPUs do not help, its {largest} take {need[largest] / GIB:.1f} GiB: "
        "lower --optimizer.microbatch_tokens or use GPUs with more memory"
    )


def plan(
    run, gpus=1, gpu_memory_gib=80.0, peak_flops=989e12, utilisation=0.25, dollars_per_gpu_hour=2.0
):
    """Everything above for a RunConfig on `gpus` GPUs, as a dict that JSON can hold.

    peak_flops: of one GPU in the run's dtype, per second (989e12: H100, bfloat16, dense). utilisation: the share of it
    that training reaches; 0.25 is what good MoE training reports. Raises ValueError, one line, for what cannot fit and
    for impossible numbers.
    """
    for name, value in (
        ("gpus", gpus),
        ("gpu_memory_gib", gpu_memory_gib),
        ("peak_flops", peak_flops),
    ):
        if value <= 0:
            raise ValueError(f"{name} = {value}: must be positive")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation = {utilisation}: a share of the peak, above 0 and at most 1")
    usable = USABLE * gpu_memory_gib * GIB
    recompute = run.recompute or memory(run, gpus)["total"] > usable
    if recompute and memory(run, gpus, recompute)["total"] > usable:
        _refuse(run, gpus, usable)
    stages, speed = [], peak_flops * utilisation
    for name, stage in run.stages.items():
        flops = flops_per_token(run.model, stage.sequence_length)["total"]
        stages.append(
            {
                "stage": name,
                "tokens": stage.tokens,
                "sequence_length": stage.sequence_length,
                "flops_per_token": flops,
            }
            | {
                "tokens_per_second_per_gpu": speed / flops,
                "days": stage.tokens * flops / (speed * gpus) / 86400,
            }
        )
    days = sum(stage["days"] for stage in stages)
    return {
        "run": run.name,
        "gpus": gpus,
        "gpu_memory_gib": gpu_memory_gib,
        "parameters": count_parameters(run.model),
        "placement": placement(run, gpus) | {"recompute": recompute},
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


def _size(number, unit=""):
    """A number with three digits and its thousands: 355B, 32.1B, 512K."""
    for power, letter in ((12, "T"), (9, "B" if not unit else "G"), (6, "M"), (3, "K")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.4g}{letter}{unit}"
    return f"{number:.4g}{unit}"


def render(plan):
    """The plan as text, one block per question."""
    n, where, assumed = plan["parameters"], plan["placement"], plan["assumed"]
    lines = [f"{plan['run']} on {plan['gpus']} x {plan['gpu_memory_gib']:g} GiB", "", "parameters"]
    lines += [f"  {name:<24}{n[name]:>22,}" for name in n]
    lines += ["", "memory per GPU (* estimate)"]
    for name, size in plan["memory"].items():
        star = "*" if name in ("working copies", "activations", "head", "total") else " "
        lines.append(f"  {name + ' ' + star:<24}{size / GIB:>18.3f} GiB")
    lines += [
        f"  micro-batch of {where['tokens']:,} tokens, experts over {where['expert_parallel']}, sequences over "
        f"{where['context_parallel']} GPUs, activations {'recomputed' if where['recompute'] else 'kept'}",
        "",
        f"key/value cache           {plan['kv_cache_bytes_per_token']:,} bytes per token in bfloat16",
        "traffic per micro-batch * "
        + ", ".join(f"{k} {_size(v, 'B')}" for k, v in plan["traffic"].items()),
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
