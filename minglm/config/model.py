"""The shape of the network: one dataclass, from 0.2 M to 355 B parameters (paper 2.1, Table 1).

Its fields have Hugging Face's names, so that a released `config.json` maps one to one
(`minglm.model.hf.config`). With `kv_lora_rank` above 0 the attention is multi-head latent attention, as in
GLM-4.7-Flash, and the fields of `MLA_FIELDS` give its widths. `check` refuses a shape that cannot be built.
"""

from dataclasses import dataclass
from typing import NoReturn

from minglm.config.options import check_fields, option, positive, share

MLA_FIELDS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network (paper 2.1, Table 1). Defaults are GLM-4.5, 355B-A32B."""

    vocab_size: int = positive(151552, maximum=2**24)
    """Rows of the embedding and of the output head."""
    hidden_size: int = positive(5120, maximum=2**20)
    """Width D of the residual stream."""
    num_hidden_layers: int = positive(92, maximum=10_000)
    """Decoder layers, without the MTP layer."""
    first_k_dense_replace: int = option(3, maximum=10_000)
    """Leading layers that have a dense FFN in place of experts."""
    num_nextn_predict_layers: int = 1
    """MTP layers (0 or 1): one more layer, which predicts the token after the next."""
    num_attention_heads: int = positive(96, maximum=2**16)
    """Query heads N: 2.5 times as many as usual for this width, which helps reasoning (paper 2.1)."""
    num_key_value_heads: int = positive(8, maximum=2**16)
    """Key/value heads M; each serves N / M query heads."""
    head_dim: int = positive(128, maximum=2**16)
    """Width A of one query or key head; N * A need not equal the hidden size."""
    partial_rotary_factor: float = share(0.5)
    """Share of each head's dimensions that rotate with the position (MLA uses qk_rope_head_dim instead)."""
    kv_lora_rank: int = option(0, maximum=2**20)
    """Width L of the latent for keys and values (MLA, GLM-4.7-Flash: 512); 0: grouped-query attention."""
    q_lora_rank: int = option(0, maximum=2**20)
    """MLA: width of the latent for queries; 0: one projection, without a latent."""
    qk_nope_head_dim: int = option(0, maximum=2**16)
    """MLA: dimensions of a query or key head that do not rotate."""
    qk_rope_head_dim: int = option(0, maximum=2**16)
    """MLA: dimensions R that rotate, whose key all heads share; head_dim = qk_nope_head_dim + qk_rope_head_dim."""
    v_head_dim: int = option(0, maximum=2**16)
    """MLA: width of a value head."""
    rope_theta: float = positive(1_000_000.0)
    """Base of the rotary frequencies of the finished model; during training each stage sets its own."""
    intermediate_size: int = positive(12288, maximum=2**24)
    """FFN width of the dense layers."""
    moe_intermediate_size: int = positive(1536, maximum=2**24)
    """FFN width F of one expert."""
    n_routed_experts: int = positive(160, maximum=2**16)
    """Experts E the router chooses from."""
    num_experts_per_tok: int = positive(8, maximum=2**16)
    """Experts K chosen for each token."""
    n_shared_experts: int = option(1, maximum=2**10)
    """Experts that every token visits, ungated."""
    n_group: int = positive(1, maximum=2**16)
    """Groups of experts for group-limited routing (1: no limit)."""
    topk_group: int = positive(1, maximum=2**16)
    """Groups a token may choose experts from."""
    routed_scaling_factor: float = 2.5
    """Factor on the normalised weights of the routed experts (GLM-4.5-Air: 1.0)."""
    norm_topk_prob: bool = True
    """Divide the chosen experts' scores by their sum."""
    use_qk_norm: bool = True
    """RMSNorm on each query and key head (GLM-4.5: yes, Air: no)."""
    attention_bias: bool = True
    """Biases on the q, k and v projections (MLA: on both projections into a latent, and on the output)."""
    tie_word_embeddings: bool = False
    """Use the embedding table as the output head."""
    rms_norm_eps: float = positive(1e-5)
    """Epsilon of every RMSNorm."""
    max_position_embeddings: int = positive(131072, maximum=2**30)
    """Longest sequence, in tokens."""
    initializer_range: float = positive(0.02)
    """Standard deviation of initial weights."""

    @property
    def rotary_dim(self) -> int:
        """Return the dimensions of a head that rotate."""
        if self.kv_lora_rank:
            return self.qk_rope_head_dim
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Return what a layer's cache holds for each position: (2 for key and value, heads, width of one head).

        With MLA (1, 1, L + R): the latent and the rotated key that all heads share.
        """
        if self.kv_lora_rank:
            return 1, 1, self.kv_lora_rank + self.qk_rope_head_dim
        return 2, self.num_key_value_heads, self.head_dim

    def check(self) -> None:
        """Raise ValueError for a shape that cannot be built; the message names the field, its value and the remedy."""
        check_fields(self, "model.")
        self._check_attention()
        self._check_experts()
        self._check_mla()
        self._check_layers()

    def check_trainable(self) -> None:
        """Raise ValueError for a shape that computes, but cannot learn."""
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            self._refuse(
                "num_experts_per_tok",
                "with norm_topk_prob every weight is 1 and the router gets no gradient; use 2",
            )

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise ValueError(f"model.{name} = {getattr(self, name)}: {why}")

    def _check_attention(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            self._refuse(
                "num_attention_heads",
                f"must be a multiple of num_key_value_heads = {self.num_key_value_heads}",
            )

    def _check_experts(self) -> None:
        if self.num_experts_per_tok > self.n_routed_experts:
            self._refuse(
                "num_experts_per_tok", f"cannot exceed n_routed_experts = {self.n_routed_experts}"
            )
        if self.n_routed_experts % self.n_group:
            self._refuse("n_group", f"must divide n_routed_experts = {self.n_routed_experts}")
        if self.topk_group > self.n_group:
            self._refuse("topk_group", f"cannot exceed n_group = {self.n_group}")
        experts_in_reach = self.topk_group * (self.n_routed_experts // self.n_group)
        if experts_in_reach < self.num_experts_per_tok:
            self._refuse(
                "topk_group",
                f"leaves fewer experts than num_experts_per_tok = {self.num_experts_per_tok}",
            )

    def _check_layers(self) -> None:
        if self.rotary_dim % 2:
            self._refuse(
                "partial_rotary_factor",
                f"times head_dim = {self.head_dim} must be an even number of dimensions",
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            self._refuse(
                "first_k_dense_replace",
                f"cannot exceed num_hidden_layers = {self.num_hidden_layers}",
            )
        if self.num_nextn_predict_layers > 1:
            self._refuse(
                "num_nextn_predict_layers",
                "GLM-4.5 has one MTP layer, applied repeatedly; use 0 or 1",
            )

    def _check_mla(self) -> None:
        if not self.kv_lora_rank:
            for name in MLA_FIELDS:
                if getattr(self, name):
                    self._refuse(
                        name,
                        "is a field of multi-head latent attention; set model.kv_lora_rank too, or leave it 0",
                    )
            return
        for name in ("qk_nope_head_dim", "v_head_dim"):
            if not getattr(self, name):
                self._refuse(name, f"must be positive with kv_lora_rank = {self.kv_lora_rank}")
        if self.qk_rope_head_dim % 2 or not self.qk_rope_head_dim:
            self._refuse("qk_rope_head_dim", "must be a positive even number of dimensions")
        if self.head_dim != self.qk_nope_head_dim + self.qk_rope_head_dim:
            self._refuse(
                "head_dim", "with kv_lora_rank it must be qk_nope_head_dim + qk_rope_head_dim"
            )
        if self.num_key_value_heads != self.num_attention_heads:
            self._refuse(
                "num_key_value_heads",
                "with kv_lora_rank every head has its own keys; use num_attention_heads",
            )
        if self.use_qk_norm:
            self._refuse(
                "use_qk_norm", "with kv_lora_rank the latents are normalised instead; use False"
            )
