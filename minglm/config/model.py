"""The shape of the network: one dataclass, from 0.2 M to 355 B parameters (paper 2.1, Table 1).

Its fields carry Hugging Face's names, so that a released `config.json` maps one to one (`minglm.model.hf.config`). With
`kv_lora_rank` above 0 the attention is multi-head latent attention, that of GLM-4.7-Flash, and the fields of
`MLA_FIELDS` give its widths. `check` refuses a shape that cannot be built.
"""

import dataclasses
from dataclasses import dataclass

MLA_FIELDS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network (paper 2.1, Table 1). Defaults are GLM-4.5, 355B-A32B."""

    vocab_size: int = 151552
    """Rows of the embedding and of the output head."""
    hidden_size: int = 5120
    """Width D of the residual stream."""
    num_hidden_layers: int = 92
    """Decoder layers, the MTP layer not counted."""
    first_k_dense_replace: int = 3
    """How many leading layers have a dense FFN in place of experts."""
    num_nextn_predict_layers: int = 1
    """MTP layers (0 or 1): a further layer that predicts the token after next."""
    num_attention_heads: int = 96
    """Query heads N: 2.5 times what the width suggests, which helps reasoning (paper 2.1)."""
    num_key_value_heads: int = 8
    """Key/value heads M; each serves N / M query heads."""
    head_dim: int = 128
    """Width A of one query or key head; N * A need not equal the hidden size."""
    partial_rotary_factor: float = 0.5
    """Share of each head's dimensions that rotate with the position (with MLA, qk_rope_head_dim says it)."""
    kv_lora_rank: int = 0
    """Width L of the latent that keys and values are made of (MLA, GLM-4.7-Flash: 512); 0: grouped-query attention."""
    q_lora_rank: int = 0
    """MLA: width of the latent that queries are made of; 0: none, one projection."""
    qk_nope_head_dim: int = 0
    """MLA: dimensions of a query or key head that do not rotate."""
    qk_rope_head_dim: int = 0
    """MLA: dimensions R that rotate, and whose key all heads share; head_dim is the sum of both."""
    v_head_dim: int = 0
    """MLA: width of a value head."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary frequencies once trained; while training, the stage in progress sets it."""
    intermediate_size: int = 12288
    """FFN width of the dense layers."""
    moe_intermediate_size: int = 1536
    """FFN width F of one expert."""
    n_routed_experts: int = 160
    """Experts E the router chooses from."""
    num_experts_per_tok: int = 8
    """Experts K chosen for each token."""
    n_shared_experts: int = 1
    """Experts that every token visits, ungated."""
    n_group: int = 1
    """Groups the experts are divided into for group-limited routing (1: no limit)."""
    topk_group: int = 1
    """Groups a token may choose experts from."""
    routed_scaling_factor: float = 2.5
    """Factor on the normalised weights of the routed experts (GLM-4.5-Air: 1.0)."""
    norm_topk_prob: bool = True
    """Whether the chosen experts' scores are divided by their sum."""
    use_qk_norm: bool = True
    """RMSNorm on each query and key head (GLM-4.5: yes, Air: no)."""
    attention_bias: bool = True
    """Biases on the q, k and v projections (MLA: on both projections into a latent, and on the output)."""
    tie_word_embeddings: bool = False
    """Whether the output head is the embedding table."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    max_position_embeddings: int = 131072
    """Longest sequence, in tokens."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights."""

    @property
    def rotary_dim(self):
        """Dimensions of a head that rotate."""
        return (
            self.qk_rope_head_dim
            if self.kv_lora_rank
            else round(self.head_dim * self.partial_rotary_factor)
        )

    @property
    def cache_shape(self):
        """What a layer's cache holds for each position: (2 for key and value, heads, width of one).

        With MLA (1, 1, L + R): the latent and the rotated key that all heads share.
        """
        if self.kv_lora_rank:
            return 1, 1, self.kv_lora_rank + self.qk_rope_head_dim
        return 2, self.num_key_value_heads, self.head_dim

    def check(self):
        """Raise ValueError for a shape that cannot be built, naming the field, its value and the remedy."""

        def refuse(name, why):
            raise ValueError(f"model.{name} = {getattr(self, name)}: {why}")

        may_be_zero = {
            "first_k_dense_replace",
            "num_nextn_predict_layers",
            "n_shared_experts",
            *MLA_FIELDS,
        }
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            least = 0 if f.name in may_be_zero else 1
            if f.type in ("int", int) and value < least:
                refuse(f.name, f"must be at least {least}")
        if self.num_attention_heads % self.num_key_value_heads:
            refuse(
                "num_attention_heads",
                f"must be a multiple of num_key_value_heads = {self.num_key_value_heads}",
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            refuse(
                "num_experts_per_tok", f"cannot exceed n_routed_experts = {self.n_routed_experts}"
            )
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            refuse(
                "num_experts_per_tok",
                "with norm_topk_prob every weight is 1 and the router gets no gradient; use 2",
            )
        if self.n_routed_experts % self.n_group:
            refuse("n_group", f"must divide n_routed_experts = {self.n_routed_experts}")
        if self.topk_group > self.n_group:
            refuse("topk_group", f"cannot exceed n_group = {self.n_group}")
        if self.topk_group * (self.n_routed_experts // self.n_group) < self.num_experts_per_tok:
            refuse(
                "topk_group",
                f"leaves fewer experts than num_experts_per_tok = {self.num_experts_per_tok}",
            )
        self._check_mla(refuse)
        if not 0 <= self.partial_rotary_factor <= 1 or self.rotary_dim % 2:
            refuse(
                "partial_rotary_factor",
                f"times head_dim = {self.head_dim} must be an even number of dimensions",
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            refuse(
                "first_k_dense_replace",
                f"cannot exceed num_hidden_layers = {self.num_hidden_layers}",
            )
        if self.num_nextn_predict_layers > 1:
            refuse(
                "num_nextn_predict_layers",
                "GLM-4.5 has one MTP layer, applied repeatedly; use 0 or 1",
            )
        if self.initializer_range <= 0 or self.rms_norm_eps <= 0 or self.rope_theta <= 0:
            raise ValueError(
                "model.initializer_range, model.rms_norm_eps and model.rope_theta must be positive"
            )

    def _check_mla(self, refuse):
        if not self.kv_lora_rank:
            for name in MLA_FIELDS:
                if getattr(self, name):
                    refuse(
                        name,
                        "is a field of multi-head latent attention; set model.kv_lora_rank too, or leave it 0",
                    )
            return
        for name in ("qk_nope_head_dim", "v_head_dim"):
            if not getattr(self, name):
                refuse(name, f"must be positive with kv_lora_rank = {self.kv_lora_rank}")
        if self.qk_rope_head_dim % 2 or not self.qk_rope_head_dim:
            refuse("qk_rope_head_dim", "must be a positive even number of dimensions")
        if self.head_dim != self.qk_nope_head_dim + self.qk_rope_head_dim:
            refuse("head_dim", "with kv_lora_rank it must be qk_nope_head_dim + qk_rope_head_dim")
        if self.num_key_value_heads != self.num_attention_heads:
            refuse(
                "num_key_value_heads",
                "with kv_lora_rank every head has its keys; use num_attention_heads",
            )
        if self.use_qk_norm:
            refuse("use_qk_norm", "with kv_lora_rank the latents are normalised instead; use False")
