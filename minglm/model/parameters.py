"""One table of every kind of parameter: name, shape, optimizer, weight decay, initial value (paper 2.1, 2.4, Table 1).

`PARAMETERS` has a row for each name of a layer or of the model, `TREATMENT` says how each kind is trained.
Whoever asks "what kind of tensor is this?" reads them: initialisation (`minglm.model.glm`), the optimizer
(`minglm.optim.muon`), reading and writing released checkpoints (`minglm.model.hf.names`), and tests of the
planner's counts.

minglm's parameters carry the names of the released checkpoints. Only the experts differ: a file holds one
matrix for each expert and projection, the model one stack of them for each projection.

Choices, see `minglm.optim.muon`: Muon trains every matrix but the embedding and the output head, router and
MTP projection included; AdamW trains those two, norms and biases; weight decay is for matrices only. The
selection bias is a buffer, which no optimizer moves (`minglm.model.balance`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class ParameterKind(StrEnum):
    """The kind of a parameter; `TREATMENT` says how each kind is trained."""

    EMBEDDING = "embedding"
    """The token embedding: a row for each token."""
    OUTPUT_HEAD = "output_head"
    """The output head: a row for each token."""
    PROJECTION = "projection"
    """A matrix of attention, of a dense FFN, or of the shared expert."""
    HEADS_PROJECTION = "heads_projection"
    """A projection to queries, keys or values, whose rows are heads one after the other."""
    MTP_PROJECTION = "mtp_projection"
    """The MTP layer's projection of a state and an embedding."""
    ROUTER = "router"
    """The router's matrix: a row for each expert."""
    EXPERTS = "experts"
    """A stack of one matrix for each expert."""
    NORM = "norm"
    """The weight of an RMSNorm."""
    BIAS = "bias"
    """The bias of a projection."""
    SELECTION_BIAS = "selection_bias"
    """The router's selection bias: a buffer, float32 always."""


class OptimizerKind(StrEnum):
    """The optimizer that trains a parameter."""

    MUON = "muon"
    """Muon, matrix by matrix."""
    ADAMW = "adamw"
    """AdamW, value by value."""
    NONE = "none"
    """No optimizer."""


class Initial(StrEnum):
    """The values before training."""

    NORMAL = "normal"
    """Normal, with the standard deviation `initializer_range`."""
    ONE = "one"
    """One everywhere."""
    ZERO = "zero"
    """Zero everywhere."""


@dataclass(frozen=True)
class Treatment:
    """The training and storage of a kind of parameter."""

    optimizer: OptimizerKind
    weight_decay: bool
    initial: Initial
    float8: bool = False
    """True where FP8 checkpoints store it in blocks of float8."""


TREATMENT: dict[ParameterKind, Treatment] = {
    ParameterKind.EMBEDDING: Treatment(OptimizerKind.ADAMW, True, Initial.NORMAL),
    # `optimizer.muon_output_head` gives it to Muon.
    ParameterKind.OUTPUT_HEAD: Treatment(OptimizerKind.ADAMW, True, Initial.NORMAL),
    ParameterKind.PROJECTION: Treatment(OptimizerKind.MUON, True, Initial.NORMAL, float8=True),
    ParameterKind.HEADS_PROJECTION: Treatment(
        OptimizerKind.MUON, True, Initial.NORMAL, float8=True
    ),
    ParameterKind.MTP_PROJECTION: Treatment(OptimizerKind.MUON, True, Initial.NORMAL),
    ParameterKind.ROUTER: Treatment(OptimizerKind.MUON, True, Initial.NORMAL),
    ParameterKind.EXPERTS: Treatment(OptimizerKind.MUON, True, Initial.NORMAL, float8=True),
    ParameterKind.NORM: Treatment(OptimizerKind.ADAMW, False, Initial.ONE),
    ParameterKind.BIAS: Treatment(OptimizerKind.ADAMW, False, Initial.ZERO),
    ParameterKind.SELECTION_BIAS: Treatment(OptimizerKind.NONE, False, Initial.ZERO),
}


class Part(StrEnum):
    """Where a parameter is; `minglm.model.hf.names.layer_parts` says which layers have which parts."""

    MODEL = "model"
    """Once in the model."""
    LAYER = "layer"
    """In every layer."""
    ATTENTION = "attention"
    """In the attention of every layer, grouped-query attention."""
    ATTENTION_BIAS = "attention_bias"
    """The same, with `attention_bias`."""
    QK_NORM = "qk_norm"
    """The same, with `use_qk_norm`."""
    MLA = "mla"
    """In the attention of every layer, latent attention."""
    MLA_BIAS = "mla_bias"
    """The same, with `attention_bias`."""
    MLA_QUERY = "mla_query"
    """Latent attention whose queries have no latent."""
    MLA_QUERY_LATENT = "mla_query_latent"
    """Latent attention whose queries have a latent."""
    MLA_QUERY_BIAS = "mla_query_bias"
    """The same, with `attention_bias`."""
    DENSE = "dense"
    """In the FFN of the first layers."""
    MOE = "moe"
    """In the FFN of the other layers: the router."""
    SHARED = "shared"
    """In the FFN of the other layers: the shared expert."""
    EXPERTS = "experts"
    """In the FFN of the other layers: the routed experts."""
    MTP = "mtp"
    """In the MTP layer only."""
    MTP_COPY = "mtp_copy"
    """In the MTP layer of some checkpoints: a copy of another tensor. Not a parameter of the model."""


@dataclass(frozen=True)
class ParameterRow:
    """One row of the table."""

    part: Part
    name: str
    """In the model, without the `model.layers.N.` of a layer."""
    axes: str
    """Names of sizes, one for each axis; `minglm.model.hf.names.sizes` has their values. Of one expert's matrix."""
    kind: ParameterKind
    hf_name: str = ""
    """In a released checkpoint, `*` for the number of an expert; empty: the same as `name`."""
    copy_of: str = ""
    """The tensor that this one is a copy of."""


_K = ParameterKind
PARAMETERS: tuple[ParameterRow, ...] = (
    ParameterRow(Part.MODEL, "model.embed_tokens.weight", "vocabulary width", _K.EMBEDDING),
    ParameterRow(Part.MODEL, "model.norm.weight", "width", _K.NORM),
    ParameterRow(Part.MODEL, "lm_head.weight", "vocabulary width", _K.OUTPUT_HEAD),
    ParameterRow(Part.LAYER, "input_layernorm.weight", "width", _K.NORM),
    ParameterRow(Part.LAYER, "post_attention_layernorm.weight", "width", _K.NORM),
    # Grouped-query attention
    ParameterRow(Part.ATTENTION, "self_attn.q_proj.weight", "queries width", _K.HEADS_PROJECTION),
    ParameterRow(Part.ATTENTION, "self_attn.o_proj.weight", "width queries", _K.PROJECTION),
    ParameterRow(Part.ATTENTION, "self_attn.k_proj.weight", "keys width", _K.HEADS_PROJECTION),
    ParameterRow(Part.ATTENTION, "self_attn.v_proj.weight", "keys width", _K.HEADS_PROJECTION),
    ParameterRow(Part.ATTENTION_BIAS, "self_attn.q_proj.bias", "queries", _K.BIAS),
    ParameterRow(Part.ATTENTION_BIAS, "self_attn.k_proj.bias", "keys", _K.BIAS),
    ParameterRow(Part.ATTENTION_BIAS, "self_attn.v_proj.bias", "keys", _K.BIAS),
    ParameterRow(Part.QK_NORM, "self_attn.q_norm.weight", "head", _K.NORM),
    ParameterRow(Part.QK_NORM, "self_attn.k_norm.weight", "head", _K.NORM),
    # Latent attention
    ParameterRow(
        Part.MLA, "self_attn.kv_a_proj_with_mqa.weight", "latent+rope width", _K.PROJECTION
    ),
    ParameterRow(Part.MLA, "self_attn.kv_a_layernorm.weight", "latent", _K.NORM),
    ParameterRow(Part.MLA, "self_attn.kv_b_proj.weight", "unfolded latent", _K.PROJECTION),
    ParameterRow(Part.MLA, "self_attn.o_proj.weight", "width values", _K.PROJECTION),
    ParameterRow(Part.MLA_BIAS, "self_attn.kv_a_proj_with_mqa.bias", "latent+rope", _K.BIAS),
    ParameterRow(Part.MLA_BIAS, "self_attn.o_proj.bias", "width", _K.BIAS),
    ParameterRow(Part.MLA_QUERY, "self_attn.q_proj.weight", "queries width", _K.HEADS_PROJECTION),
    ParameterRow(
        Part.MLA_QUERY_LATENT, "self_attn.q_a_proj.weight", "query_latent width", _K.PROJECTION
    ),
    ParameterRow(Part.MLA_QUERY_LATENT, "self_attn.q_a_layernorm.weight", "query_latent", _K.NORM),
    ParameterRow(
        Part.MLA_QUERY_LATENT, "self_attn.q_b_proj.weight", "queries query_latent", _K.PROJECTION
    ),
    ParameterRow(Part.MLA_QUERY_BIAS, "self_attn.q_a_proj.bias", "query_latent", _K.BIAS),
    # FFN
    ParameterRow(Part.DENSE, "mlp.gate_proj.weight", "inner width", _K.PROJECTION),
    ParameterRow(Part.DENSE, "mlp.up_proj.weight", "inner width", _K.PROJECTION),
    ParameterRow(Part.DENSE, "mlp.down_proj.weight", "width inner", _K.PROJECTION),
    ParameterRow(Part.MOE, "mlp.gate.weight", "experts width", _K.ROUTER),
    ParameterRow(Part.MOE, "mlp.gate.e_score_correction_bias", "experts", _K.SELECTION_BIAS),
    ParameterRow(Part.SHARED, "mlp.shared_experts.gate_proj.weight", "shared width", _K.PROJECTION),
    ParameterRow(Part.SHARED, "mlp.shared_experts.up_proj.weight", "shared width", _K.PROJECTION),
    ParameterRow(Part.SHARED, "mlp.shared_experts.down_proj.weight", "width shared", _K.PROJECTION),
    ParameterRow(
        Part.EXPERTS,
        "mlp.experts.gate_EFD",
        "expert width",
        _K.EXPERTS,
        hf_name="mlp.experts.*.gate_proj.weight",
    ),
    ParameterRow(
        Part.EXPERTS,
        "mlp.experts.up_EFD",
        "expert width",
        _K.EXPERTS,
        hf_name="mlp.experts.*.up_proj.weight",
    ),
    ParameterRow(
        Part.EXPERTS,
        "mlp.experts.down_EDF",
        "width expert",
        _K.EXPERTS,
        hf_name="mlp.experts.*.down_proj.weight",
    ),
    # MTP layer
    ParameterRow(Part.MTP, "enorm.weight", "width", _K.NORM),
    ParameterRow(Part.MTP, "hnorm.weight", "width", _K.NORM),
    ParameterRow(Part.MTP, "shared_head.norm.weight", "width", _K.NORM),
    ParameterRow(Part.MTP, "eh_proj.weight", "width width+width", _K.MTP_PROJECTION),
    ParameterRow(
        Part.MTP_COPY,
        "embed_tokens.weight",
        "vocabulary width",
        _K.EMBEDDING,
        copy_of="model.embed_tokens.weight",
    ),
    ParameterRow(
        Part.MTP_COPY,
        "shared_head.head.weight",
        "vocabulary width",
        _K.OUTPUT_HEAD,
        copy_of="lm_head.weight",
    ),
)


def rows_of(parts: Sequence[Part]) -> list[ParameterRow]:
    """Return the rows of these parts, part by part, in the order of the table."""
    return [row for part in parts for row in PARAMETERS if row.part == part]


# A wrapper, like DistributedDataParallel, may put a prefix before every name.
_LAYER = re.compile(r"^(?:.*\.)?model\.layers\.\d+\.")
_PREFIX = re.compile(r"^.*\.(?=(?:model\.embed_tokens|model\.norm|lm_head)\.)")
_EXPERT = re.compile(r"\bexperts\.\d+\.")
_KINDS: dict[str, ParameterKind] = {}
for _row in PARAMETERS:
    for _name in (_row.name, _row.hf_name or _row.name):
        if _KINDS.setdefault(_name, _row.kind) != _row.kind:
            raise AssertionError(f"{_name} has two kinds in the table of parameters")


def kind_of(name: str) -> ParameterKind | None:
    """Return the kind of a parameter or buffer by its name in the model or in a released checkpoint; None: unknown."""
    short = _PREFIX.sub("", _LAYER.sub("", name))
    return _KINDS.get(_EXPERT.sub("experts.*.", short))
