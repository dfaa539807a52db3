"""Count parameters, operations per token and cache bytes of a model from its config (paper Table 1).

    attention   D (N + 2 M) A + N A D, biases (N + 2 M) A, QK-norm 2 A
    MLA         D Q + Q N A + D (L + R) + L N (A - R + V) + N V D, norms Q + L
                (Q and L are the widths of the latents, R the dimensions that rotate, V the width of a value)
    expert      3 D F          dense FFN   3 D I
    MoE block   (E + shared) expert + E D + E
    MTP         2 D D + 3 D + one MoE layer
    training FLOPs per token = 6 * active parameters with the head + 6 N A S a layer for causal attention
                (2 forward and 4 backward)

Parameters and operations are exact.
"""

import math
from typing import NamedTuple

from minglm.config.model import ModelConfig


class AttentionCounts(NamedTuple):
    """Parameters of one attention layer."""

    matrices: int
    """In projections."""
    vectors: int
    """In biases and norms."""


class FlopsPerToken(NamedTuple):
    """Training FLOPs per token, forward and backward, nothing recomputed."""

    matmul: int
    """6 per active parameter, head included; the embedding's look-up is free."""
    attention: int
    """Causal attention: a token sees half of the sequence on average."""
    mtp: int
    """The MTP layer and its pass through the head; 0 without one."""
    total: int
    """The sum."""


def attention_counts(c: ModelConfig) -> AttentionCounts:
    """Count the parameters of one attention layer."""
    if c.kv_lora_rank:
        return _mla_counts(c)
    D = c.hidden_size
    A = c.head_dim
    q_width = c.num_attention_heads * A
    kv_width = 2 * c.num_key_value_heads * A
    matrices = D * (q_width + kv_width) + q_width * D
    biases = q_width + kv_width if c.attention_bias else 0
    norms = 2 * A if c.use_qk_norm else 0
    return AttentionCounts(matrices, biases + norms)


def _mla_counts(c: ModelConfig) -> AttentionCounts:
    """Count the parameters of one layer of latent attention."""
    D = c.hidden_size
    N = c.num_attention_heads
    Q = c.q_lora_rank
    L = c.kv_lora_rank
    R = c.qk_rope_head_dim
    V = c.v_head_dim
    q_width = N * c.head_dim
    query = D * Q + Q * q_width if Q else D * q_width
    latent = D * (L + R)
    keys_and_values = L * N * (c.qk_nope_head_dim + V)
    output = N * V * D
    norms = Q + L
    biases = Q + L + R + D if c.attention_bias else 0
    return AttentionCounts(query + latent + keys_and_values + output, norms + biases)


def unit_counts(c: ModelConfig) -> dict[str, int]:
    """Count the parameters of one piece of each kind: attention, expert, shared, dense, router, moe, mtp."""
    D = c.hidden_size
    attention = sum(attention_counts(c))
    expert = 3 * D * c.moe_intermediate_size
    shared = c.n_shared_experts * expert
    router = c.n_routed_experts * (D + 1)  # a row and a selection bias for each expert
    moe = c.n_routed_experts * expert + shared + router
    layer_norms = 2 * D
    mtp_projection_and_norms = 2 * D * D + 3 * D
    return {
        "attention": attention,
        "expert": expert,
        "shared": shared,
        "dense": 3 * D * c.intermediate_size,
        "router": router,
        "moe": moe,
        "mtp": mtp_projection_and_norms + attention + layer_norms + moe,
    }


def count_parameters(c: ModelConfig) -> dict[str, int]:
    """Count the parameters of a model exactly, by name. The router's selection bias counts, as in the paper.

    By kind, over the body: attention, dense, experts, shared, router, norms. Then embedding, head, mtp; the
    sums body, body_with_mtp, total (body, embedding, head), total_with_mtp, and total_with_mtp_copies (the
    released GLM-4.5 stores embedding and head a second time in the MTP layer); and what one token uses:
    active_body, active_with_mtp, active_with_head, active_with_embedding.
    """
    unit = unit_counts(c)
    D = c.hidden_size
    layers = c.num_hidden_layers
    dense_layers = c.first_k_dense_replace
    moe_layers = layers - dense_layers
    mtp_layers = c.num_nextn_predict_layers
    by_kind = {
        "attention": layers * unit["attention"],
        "dense": dense_layers * unit["dense"],
        "experts": moe_layers * c.n_routed_experts * unit["expert"],
        "shared": moe_layers * unit["shared"],
        "router": moe_layers * unit["router"],
        "norms": layers * 2 * D + D,
    }
    body = sum(by_kind.values())
    embedding = c.vocab_size * D
    head = 0 if c.tie_word_embeddings else embedding
    mtp = unit["mtp"] * mtp_layers
    # The experts of a layer that a token does not use.
    idle = (c.n_routed_experts - c.num_experts_per_tok) * unit["expert"]
    active_body = body - moe_layers * idle
    return by_kind | {
        "embedding": embedding,
        "head": head,
        "mtp": mtp,
        "body": body,
        "body_with_mtp": body + mtp,
        "total": body + embedding + head,
        "total_with_mtp": body + mtp + embedding + head,
        "total_with_mtp_copies": body + mtp + (embedding + head) * (1 + mtp_layers),
        "active_body": active_body,
        "active_with_mtp": active_body + mtp - mtp_layers * idle,
        "active_with_head": active_body + embedding,
        "active_with_embedding": active_body + embedding + head,
    }


def flops_per_token(c: ModelConfig, sequence_length: int) -> FlopsPerToken:
    """Count the training FLOPs per token, in rows of `sequence_length` tokens."""
    count = count_parameters(c)
    value_width = c.v_head_dim if c.kv_lora_rank else c.head_dim
    widths = c.head_dim + value_width  # of a key and a value
    attention_layer = 3 * c.num_attention_heads * widths * sequence_length
    matmul = 6 * count["active_with_head"]
    attention = c.num_hidden_layers * attention_layer
    mtp = 0
    if c.num_nextn_predict_layers:
        mtp_layer = count["active_with_mtp"] - count["active_body"]
        mtp = 6 * (mtp_layer + count["embedding"]) + attention_layer
    return FlopsPerToken(matmul, attention, mtp, matmul + attention + mtp)


def kv_cache_bytes_per_token(c: ModelConfig, bytes_per_value: int = 2) -> int:
    """Count the bytes of keys and values that generation holds for each position; bfloat16 by default, without MTP."""
    return c.num_hidden_layers * math.prod(c.cache_shape) * bytes_per_value
