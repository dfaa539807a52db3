"""Count parameters, operations per token and cache bytes of a model from its config (paper Table 1)."""

import math


def attention_counts(c):
    """(parameters in matrices, in vectors) of one attention layer; vectors are its biases and norms."""
    D, N, M, A = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    if not c.kv_lora_rank:
        return D * (N + 2 * M) * A + N * A * D, (
            N + 2 * M
        ) * A * c.attention_bias + 2 * A * c.use_qk_norm
    Q, L, R, V = c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim, c.v_head_dim
    query = D * Q + Q * N * A if Q else D * N * A
    matrices = query + D * (L + R) + L * N * (c.qk_nope_head_dim + V) + N * V * D
    return matrices, Q + L + (Q + L + R + D) * c.attention_bias


def unit_counts(c):
    """Parameters of one piece of each kind in a ModelConfig: attention, expert, shared, dense, router, moe, mtp."""
    D = c.hidden_size
    expert = 3 * D * c.moe_intermediate_size
    units = {
        "attention": sum(attention_counts(c)),
        "expert": expert,
        "shared": c.n_shared_experts * expert,
        "dense": 3 * D * c.intermediate_size,
        "router": c.n_routed_experts * (D + 1),
    }
    units["moe"] = c.n_routed_experts * expert + units["shared"] + units["router"]
    units["mtp"] = 2 * D * D + 3 * D + units["attention"] + 2 * D + units["moe"]
    return units


def count_parameters(c):
    """Exact parameter counts of a ModelConfig, as a dict. The router's selection bias counts, as in the paper.

    By kind, over the body: attention, dense, experts, shared, router, norms. Then embedding, head, mtp; the sums body,
    body_with_mtp, total (body, embedding, head), total_with_mtp, and total_with_mtp_copies (the released GLM-4.5 stores
    embedding and head a second time in the MTP layer); and what one token uses: active_body, active_with_mtp,
    active_with_head, active_with_embedding.
    """
    u, D, L = unit_counts(c), c.hidden_size, c.num_hidden_layers
    moe_layers = L - c.first_k_dense_replace
    counts = {
        "attention": L * u["attention"],
        "dense": c.first_k_dense_replace * u["dense"],
        "experts": moe_layers * c.n_routed_experts * u["expert"],
        "shared": moe_layers * u["shared"],
        "router": moe_layers * u["router"],
        "norms": L * 2 * D + D,
    }
    body = sum(counts.values())
    embedding, mtp = c.vocab_size * D, u["mtp"] * c.num_nextn_predict_layers
    head = 0 if c.tie_word_embeddings else embedding
    idle = (c.n_routed_experts - c.num_experts_per_tok) * u["expert"]
    active = body - moe_layers * idle
    return counts | {
        "embedding": embedding,
        "head": head,
        "mtp": mtp,
        "body": body,
        "body_with_mtp": body + mtp,
        "total": body + embedding + head,
        "total_with_mtp": body + mtp + embedding + head,
        "total_with_mtp_copies": body + mtp + (embedding + head) * (1 + c.num_nextn_predict_layers),
        "active_body": active,
        "active_with_mtp": active + mtp - c.num_nextn_predict_layers * idle,
        "active_with_head": active + embedding,
        "active_with_embedding": active + embedding + head,
    }


def flops_per_token(c, sequence_length):
    """Training FLOPs per token, forward and backward, nothing recomputed: dict of matmul, attention, mtp and total.

    matmul: 6 per active parameter, head included, the embedding's look-up free. attention: causal, so a token sees half
    of the sequence on average. mtp: its layer and its pass through the head, when the config has one.
    """
    n = count_parameters(c)
    widths = c.head_dim + (c.v_head_dim if c.kv_lora_rank else c.head_dim)  # of a key and a value
    attention = 3 * c.num_attention_heads * widths * sequence_length  # of one layer
    matmul, mtp = 6 * n["active_with_head"], 0
    if c.num_nextn_predict_layers:
        mtp = 6 * (n["active_with_mtp"] - n["active_body"] + n["embedding"]) + attention
    attention *= c.num_hidden_layers
    return {"matmul": matmul, "attention": attention, "mtp": mtp, "total": matmul + attention + mtp}


def kv_cache_bytes_per_token(c, bytes_per_value=2):
    """Bytes of keys and values that generation holds for each position, in bfloat16 by default; MTP not counted."""
    return c.num_hidden_layers * math.prod(c.cache_shape) * bytes_per_value
