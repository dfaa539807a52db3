"""The tensors of released checkpoints, for glm4_moe (4.5, Air, 4.6, 4.7) and glm4_moe_lite (4.7-Flash) (paper Table 1).

`expected` unfolds the table of `minglm.model.parameters` for a config: every name once, its shape, and the
tensor of the model that it belongs to. Whatever reads or writes checkpoints (`minglm.model.hf.files`) uses
it.

A file holds one matrix for each expert and projection (or, written by some tools, gate and up of all experts
as one stack), the model three stacks per layer. The MTP layer is layer `num_hidden_layers`: a MoE layer with
four additional tensors. GLM-4.5 stores copies of embedding and output head with it, GLM-4.6 does not.
"""

from dataclasses import dataclass
from enum import StrEnum

from minglm.config import ModelConfig
from minglm.model.parameters import TREATMENT, ParameterRow, Part, kind_of, rows_of

FUSED = {"gate_up_proj": ("gate_EFD", "up_EFD"), "down_proj": ("down_EDF",)}
"""Stack of all experts in a file: the stacks of the model that it holds, one after the other along axis 1."""


class EntryKind(StrEnum):
    """The relation of a tensor of a checkpoint to the model."""

    WEIGHT = "weight"
    """A tensor of the model."""
    MTP = "mtp"
    """A tensor of the MTP layer, which some tools leave out."""
    COPY = "copy"
    """A duplicate of another tensor, which may be absent."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    target: str
    """The tensor of the model that it belongs to."""
    expert: int | None = None
    """The index in the target, a stack; None: the whole target."""
    kind: EntryKind = EntryKind.WEIGHT


def sizes(config: ModelConfig) -> dict[str, int]:
    """Return the size of each axis that the table of parameters names."""
    heads = config.num_attention_heads
    return {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "head": config.head_dim,
        "queries": heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "inner": config.intermediate_size,
        "experts": config.n_routed_experts,
        "expert": config.moe_intermediate_size,
        "shared": config.n_shared_experts * config.moe_intermediate_size,
        "latent": config.kv_lora_rank,
        "query_latent": config.q_lora_rank,
        "rope": config.qk_rope_head_dim,
        "values": heads * config.v_head_dim,
        "unfolded": heads * (config.qk_nope_head_dim + config.v_head_dim),
    }


def attention_parts(config: ModelConfig) -> list[Part]:
    """Return the parts of the attention of each layer."""
    if not config.kv_lora_rank:
        parts = [Part.ATTENTION]
        if config.attention_bias:
            parts.append(Part.ATTENTION_BIAS)
        if config.use_qk_norm:
            parts.append(Part.QK_NORM)
        return parts
    parts = [Part.MLA]
    if config.attention_bias:
        parts.append(Part.MLA_BIAS)
    if not config.q_lora_rank:
        return [*parts, Part.MLA_QUERY]
    parts.append(Part.MLA_QUERY_LATENT)
    if config.attention_bias:
        parts.append(Part.MLA_QUERY_BIAS)
    return parts


def layer_parts(config: ModelConfig, layer: int) -> list[Part]:
    """Return the parts of a layer, the routed experts and the copies last.

    Layer `num_hidden_layers` is the MTP layer.
    """
    is_mtp = layer == config.num_hidden_layers
    parts = [Part.LAYER, *attention_parts(config)]
    if layer < config.first_k_dense_replace and not is_mtp:
        return [*parts, Part.DENSE]
    parts.append(Part.MOE)
    if config.n_shared_experts:
        parts.append(Part.SHARED)
    if is_mtp:
        parts += [Part.MTP, Part.MTP_COPY]
    return [*parts, Part.EXPERTS]


def expected(config: ModelConfig) -> dict[str, Entry]:
    """Return every tensor that a checkpoint of this config may hold, by name, in the order of the layers."""
    size = sizes(config)
    entries: dict[str, Entry] = {}

    def shape(row: ParameterRow) -> tuple[int, ...]:
        # An axis like latent+rope has the sum of both sizes.
        return tuple(sum(size[name] for name in axis.split("+")) for axis in row.axes.split())

    for row in rows_of([Part.MODEL]):
        if row.name == "lm_head.weight" and config.tie_word_embeddings:
            entries[row.name] = Entry(shape(row), "model.embed_tokens.weight", kind=EntryKind.COPY)
        else:
            entries[row.name] = Entry(shape(row), row.name)
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}."
        kind = EntryKind.MTP if layer == config.num_hidden_layers else EntryKind.WEIGHT
        parts = layer_parts(config, layer)
        for row in rows_of([part for part in parts if part != Part.EXPERTS]):
            if row.copy_of:
                original = entries[row.copy_of].target
                entries[prefix + row.name] = Entry(shape(row), original, kind=EntryKind.COPY)
            else:
                entries[prefix + row.name] = Entry(shape(row), prefix + row.name, kind=kind)
        if Part.EXPERTS not in parts:
            continue
        for expert in range(config.n_routed_experts):
            for row in rows_of([Part.EXPERTS]):
                name = prefix + row.hf_name.replace("*", str(expert))
                entries[name] = Entry(shape(row), prefix + row.name, expert, kind)
    return entries


def goes_to_float8(name: str) -> bool:
    """Return True where FP8 checkpoints quantise a tensor: projections but eh_proj; no norm, embedding or router."""
    kind = kind_of(name)
    return kind is not None and TREATMENT[kind].float8
