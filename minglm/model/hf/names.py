"""The names of released checkpoints: one table for glm4_moe (4.5, Air, 4.6, 4.7) and glm4_moe_lite (4.7-Flash).

`TABLE` has every name once, with its axes (paper 2.1, Table 1). minglm's parameters carry the same names; only the
experts differ: a file holds one matrix per expert and projection (or, written by some tools, gate and up of all experts
as one stack), the model three stacks per layer. `expected` unfolds the table for a config, and whatever reads or writes
checkpoints (`minglm.model.hf.files`) or compares with another implementation (`minglm.model.parity`) goes by it.

The MTP layer is layer `num_hidden_layers`: a MoE layer with four tensors of its own. GLM-4.5 stores copies of embedding
and output head with it, GLM-4.6 does not.
"""

from dataclasses import dataclass

SWIGLU = {
    "gate_proj.weight": "inner width",
    "up_proj.weight": "inner width",
    "down_proj.weight": "width inner",
}
TABLE = {
    "model": {"model.embed_tokens.weight": "vocabulary width", "model.norm.weight": "width"},
    "head": {"lm_head.weight": "vocabulary width"},
    "layer": {"input_layernorm.weight": "width", "post_attention_layernorm.weight": "width"},
    "attention": {
        **{"self_attn.q_proj.weight": "queries width", "self_attn.o_proj.weight": "width queries"},
        **{"self_attn.k_proj.weight": "keys width", "self_attn.v_proj.weight": "keys width"},
    },
    "attention_bias": {
        f"self_attn.{p}_proj.bias": s for p, s in (("q", "queries"), ("k", "keys"), ("v", "keys"))
    },
    "qk_norm": {"self_attn.q_norm.weight": "head", "self_attn.k_norm.weight": "head"},
    "mla": {
        **{
            "self_attn.kv_a_proj_with_mqa.weight": "latent+rope width",
            "self_attn.kv_a_layernorm.weight": "latent",
        },
        **{
            "self_attn.kv_b_proj.weight": "unfolded latent",
            "self_attn.o_proj.weight": "width values",
        },
    },
    "mla_bias": {
        "self_attn.kv_a_proj_with_mqa.bias": "latent+rope",
        "self_attn.o_proj.bias": "width",
    },
    "mla_query": {"self_attn.q_proj.weight": "queries width"},
    "mla_query_latent": {
        **{
            "self_attn.q_a_proj.weight": "query_latent width",
            "self_attn.q_a_layernorm.weight": "query_latent",
        },
        **{"self_attn.q_b_proj.weight": "queries query_latent"},
    },
    "mla_query_bias": {"self_attn.q_a_proj.bias": "query_latent"},
    "dense": {f"mlp.{name}": axes for name, axes in SWIGLU.items()},
    "moe": {"mlp.gate.weight": "experts width", "mlp.gate.e_score_correction_bias": "experts"},
    "shared": {
        f"mlp.shared_experts.{name}": axes.replace("inner", "shared")
        for name, axes in SWIGLU.items()
    },
    "mtp": {
        **{"enorm.weight": "width", "hnorm.weight": "width", "shared_head.norm.weight": "width"},
        **{"eh_proj.weight": "width width+width"},
    },
    "mtp_copies": {
        "embed_tokens.weight": "vocabulary width",
        "shared_head.head.weight": "vocabulary width",
    },
}
EXPERTS = {
    "gate_proj": ("gate_EFD", "expert width"),
    "up_proj": ("up_EFD", "expert width"),
    "down_proj": ("down_EDF", "width expert"),
}
"""Projection in a file: (stack in the model, axes of one expert's matrix)."""
FUSED = {"gate_up_proj": ("gate_EFD", "up_EFD"), "down_proj": ("down_EDF",)}
"""Stack of all experts in a file: the stacks of the model that it holds, one after the other along axis 1."""
ORIGINALS = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its shape, the model's tensor it belongs to, and where in it."""

    shape: tuple[int, ...]
    target: str
    expert: int | None = None
    kind: str = "weight"
    """weight; copy: a duplicate of `target` that may be absent; mtp: of the MTP layer."""


def _sizes(c):
    queries = c.num_attention_heads * c.head_dim
    found = {
        "vocabulary": c.vocab_size,
        "width": c.hidden_size,
        "queries": queries,
        "head": c.head_dim,
    }
    found |= {"keys": c.num_key_value_heads * c.head_dim, "inner": c.intermediate_size}
    found |= {
        "experts": c.n_routed_experts,
        "expert": c.moe_intermediate_size,
        "rope": c.qk_rope_head_dim,
    }
    found |= {"shared": c.n_shared_experts * c.moe_intermediate_size, "latent": c.kv_lora_rank}
    found |= {"query_latent": c.q_lora_rank, "values": c.num_attention_heads * c.v_head_dim}
    return found | {"unfolded": c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)}


def _parts(c):
    """Which parts of the table describe the attention of every layer."""
    if not c.kv_lora_rank:
        return [
            "layer",
            "attention",
            *["attention_bias"] * c.attention_bias,
            *["qk_norm"] * c.use_qk_norm,
        ]
    query = (
        ["mla_query_latent", *["mla_query_bias"] * c.attention_bias]
        if c.q_lora_rank
        else ["mla_query"]
    )
    return ["layer", "mla", *["mla_bias"] * c.attention_bias, *query]


def expected(c):
    """{name: `Entry`} of every tensor that a checkpoint of this ModelConfig may hold, in the order of the layers."""
    sizes, found = _sizes(c), {}

    def shape(axes):
        return tuple(sum(sizes[part] for part in axis.split("+")) for axis in axes.split())

    for name, axes in (TABLE["model"] | TABLE["head"]).items():
        is_copy = name == "lm_head.weight" and c.tie_word_embeddings
        found[name] = Entry(
            shape(axes),
            ORIGINALS["embed_tokens.weight"] if is_copy else name,
            kind="copy" if is_copy else "weight",
        )
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        is_mtp, prefix = layer == c.num_hidden_layers, f"model.layers.{layer}."
        kind = "mtp" if is_mtp else "weight"
        is_dense = layer < c.first_k_dense_replace and not is_mtp
        ffn = ["dense"] if is_dense else ["moe", *["shared"] * (c.n_shared_experts > 0)]
        for part in [*_parts(c), *ffn, *["mtp"] * is_mtp]:
            for name, axes in TABLE[part].items():
                found[prefix + name] = Entry(shape(axes), prefix + name, kind=kind)
        for name, axes in TABLE["mtp_copies"].items() if is_mtp else ():
            original = found[ORIGINALS[name]].target
            found[prefix + name] = Entry(shape(axes), original, kind="copy")
        for expert in range(0 if is_dense else c.n_routed_experts):
            for name, (stack, axes) in EXPERTS.items():
                full = f"{prefix}mlp.experts.{expert}.{name}.weight"
                found[full] = Entry(shape(axes), f"{prefix}mlp.experts.{stack}", expert, kind)
    return found


def goes_to_float8(name):
    """Whether FP8 checkpoints quantise this tensor: all projections but eh_proj; no norm, embedding or router."""
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and ".eh_proj." not in name
