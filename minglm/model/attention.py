"""Grouped-query attention with many heads, partial rotation and QK-norm (paper 2.1).

    q, k, v = Wq x + bq, Wk x + bk, Wv x + bv;   q, k = rope(norm(q)), rope(norm(k));   out = Wo attend(q, k, v)

Choices. N * A exceeds the width (96 heads of 128 on a width of 5120): the paper found that more heads do not
lower the loss but help reasoning. QK-norm is an RMSNorm over each head, one weight vector for all heads,
before the rotation; it bounds the attention logits (GLM-4.5 has it, Air does not). `attend` is a plain
attribute that can be replaced from outside, for example for context parallelism.
"""

from collections.abc import Callable
from typing import Any, Protocol

from einops import rearrange
from torch import Tensor, nn

from minglm.config import ModelConfig
from minglm.kernels.attention import Documents, flash_attention
from minglm.kernels.qk_norm_rope import qk_norm_rope
from minglm.model.layers import Linear, RMSNorm
from minglm.model.rope import Rotation

Attend = Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]
"""Causal attention like `flash_attention`: q (B, S, N, A), k and v (B, S, M, A), documents or None, to q's shape."""


class LayerCache(Protocol):
    """The keys and values of one layer."""

    def attend(self, q_BSNA: Tensor, k_BSMA: Tensor, v_BSMA: Any) -> Tensor:
        """Store k and v, and attend over all that is stored; returns q's shape.

        v is None for latent attention, whose keys are its values.
        """
        ...


class Attention(nn.Module):
    """One attention layer; parameter names are those of the released checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.hidden_size
        N = config.num_attention_heads
        M = config.num_key_value_heads
        A = config.head_dim
        self.heads = N
        self.kv_heads = M
        self.head_dim = A
        self.eps = config.rms_norm_eps
        self.q_proj = Linear(D, N * A, bias=config.attention_bias)
        self.k_proj = Linear(D, M * A, bias=config.attention_bias)
        self.v_proj = Linear(D, M * A, bias=config.attention_bias)
        self.o_proj = Linear(N * A, D)
        self.q_norm = RMSNorm(A, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(A, config.rms_norm_eps) if config.use_qk_norm else None
        self.attend: Attend = flash_attention

    def queries_keys(self, x_BSD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Compute what enters the dot product: rotated queries (B, S, N, A) and keys (B, S, M, A)."""
        q_BSNA = rearrange(self.q_proj(x_BSD), "b s (n a) -> b s n a", n=self.heads)
        k_BSMA = rearrange(self.k_proj(x_BSD), "b s (m a) -> b s m a", m=self.kv_heads)
        q_weight_A = None if self.q_norm is None else self.q_norm.weight
        k_weight_A = None if self.k_norm is None else self.k_norm.weight
        # rope(norm(q)), rope(norm(k))
        return qk_norm_rope(
            q_BSNA, k_BSMA, q_weight_A, k_weight_A, rotation.cos, rotation.sin, self.eps
        )

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        documents_BS: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map x (B, S, D) to (B, S, D).

        rotation: that of the positions, see `minglm.model.rope.angles`. documents int (B, S): ids that
        attention must not cross, or `SharedPrompts`. cache: the layer's cache when generating.
        """
        q_BSNA, k_BSMA = self.queries_keys(x_BSD, rotation)
        v_BSMA = rearrange(self.v_proj(x_BSD), "b s (m a) -> b s m a", m=self.kv_heads)
        if cache is None:
            out_BSNA = self.attend(q_BSNA, k_BSMA, v_BSMA, documents_BS)
        else:
            out_BSNA = cache.attend(q_BSNA, k_BSMA, v_BSMA)
        return self.o_proj(rearrange(out_BSNA, "b s n a -> b s (n a)"))
