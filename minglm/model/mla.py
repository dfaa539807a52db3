"""Multi-head latent attention, the attention of GLM-4.7-Flash (not in the paper; arXiv 2405.04434, section 2.1).

    c = norm(Wkv x)  (L values),   r = rope(Wr x)  (R values, one key for all heads)
    q_n = Wq_n norm(Wqa x),  its last R dimensions rotated;   k_n = [Uk_n c ; r],   v_n = Uv_n c
    out = Wo [ attend(q_n, k_n, v_n) ];     scale (dimensions of q_n)^-1/2

All keys and values of a position are linear in c, so the cache holds c and r: 576 values a layer in
GLM-4.7-Flash, where keys and values of its 20 heads would be 10,240.

Choices. Training and scoring compute keys and values of all positions and call `attend`, as
`minglm.model.attention` does. With a cache Uk moves to the query and Uv behind the sum over positions, so
that both products are with c itself:

    q_n . k_n = (Uk_n' q_n) . c + q_rope . r;     sum_j P_j v_nj = Uv_n sum_j P_j c_j

A cache therefore sees one key head [c ; r] that is the value too: `cache.attend(q, k, None)`. Neighbouring
dimensions rotate (`rotate_pairs`). The two inner norms have their own epsilon, 1e-6.
Simplified: Muon takes each projection as one matrix, though Wkv and U hold several.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from minglm.config import ModelConfig
from minglm.kernels.attention import Documents, flash_attention
from minglm.model.attention import Attend, LayerCache
from minglm.model.layers import Linear, RMSNorm
from minglm.model.rope import Rotation, rotate_pairs

EPSILON = 1e-6


def attend_any_width(
    attend: Attend,
    q_BSNA: Tensor,
    k_BSNA: Tensor,
    v: Tensor,
    documents_BS: Documents | None = None,
) -> Tensor:
    """Call `attend` with values (B, S, N, W) that are wider or narrower than keys, by adding zeros.

    Returns (B, S, N, W). In the released model both are 256 wide and nothing is added.
    """
    width = q_BSNA.shape[-1]
    value_width = v.shape[-1]
    extra = value_width - width
    if extra > 0:
        # `attend` divides the scores by the root of the new width, so the query is scaled up by as much.
        q_BSNA = F.pad(q_BSNA * (value_width / width) ** 0.5, (0, extra))
        k_BSNA = F.pad(k_BSNA, (0, extra))
    elif extra < 0:
        v = F.pad(v, (0, -extra))
    out = attend(q_BSNA, k_BSNA, v, documents_BS)
    return out[..., :value_width]


class LatentAttention(nn.Module):
    """One MLA layer; parameter names are those of the released checkpoints. Called like `Attention`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.hidden_size
        N = config.num_attention_heads
        L = config.kv_lora_rank
        self.heads = N
        self.latent = L
        self.value_dim = config.v_head_dim
        self.flat_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        if config.q_lora_rank:
            self.q_a_proj = Linear(D, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, EPSILON)
            self.q_b_proj = Linear(config.q_lora_rank, N * config.head_dim)
        else:
            self.q_proj = Linear(D, N * config.head_dim)
        self.kv_a_proj_with_mqa = Linear(D, L + self.rope_dim, bias=config.attention_bias)
        self.kv_a_layernorm = RMSNorm(L, EPSILON)
        self.kv_b_proj = Linear(L, N * (self.flat_dim + self.value_dim))
        self.o_proj = Linear(N * self.value_dim, D, bias=config.attention_bias)
        self.attend: Attend = flash_attention

    def queries(self, x_BSD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Compute the part of each query that does not rotate, and the rotated part: (B, S, N, ...) each."""
        if hasattr(self, "q_a_proj"):
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        else:
            q = self.q_proj(x_BSD)
        q_BSNA = rearrange(q, "b s (n a) -> b s n a", n=self.heads)
        flat, rope_BSNR = q_BSNA.split([self.flat_dim, self.rope_dim], -1)
        return flat, rotate_pairs(rope_BSNR, *rotation)

    def latents(self, x_BSD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Compute what the cache holds: the normed latent c (B, S, 1, L) and the rotated key r (B, S, 1, R)."""
        both = rearrange(self.kv_a_proj_with_mqa(x_BSD), "b s width -> b s 1 width")
        latent, key = both.split([self.latent, self.rope_dim], -1)
        return self.kv_a_layernorm(latent), rotate_pairs(key, *rotation)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        documents_BS: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map x (B, S, D) to (B, S, D); arguments as those of `minglm.model.attention.Attention.forward`."""
        flat, rope_BSNR = self.queries(x_BSD, rotation)
        latent, key = self.latents(x_BSD, rotation)
        if cache is None:
            out = self._attend_unfolded(flat, rope_BSNR, latent, key, documents_BS)
        else:
            out = self._attend_latents(flat, rope_BSNR, latent, key, cache)
        return self.o_proj(rearrange(out, "b s n v -> b s (n v)"))

    def _attend_unfolded(
        self,
        flat: Tensor,
        rope_BSNR: Tensor,
        latent: Tensor,
        key: Tensor,
        documents_BS: Documents | None,
    ) -> Tensor:
        # k_n = [Uk_n c ; r],  v_n = Uv_n c  for every position
        keys_values = rearrange(
            self.kv_b_proj(latent[:, :, 0]), "b s (n width) -> b s n width", n=self.heads
        )
        k_flat, v = keys_values.split([self.flat_dim, self.value_dim], -1)
        q_BSNA = torch.cat([flat, rope_BSNR], -1)
        k_BSNA = torch.cat([k_flat, key.expand_as(rope_BSNR)], -1)
        return attend_any_width(self.attend, q_BSNA, k_BSNA, v, documents_BS)

    def _attend_latents(
        self, flat: Tensor, rope_BSNR: Tensor, latent: Tensor, key: Tensor, cache: LayerCache
    ) -> Tensor:
        unfold = rearrange(
            self.kv_b_proj.weight.to(flat.dtype), "(n width) l -> n width l", n=self.heads
        )
        up_key, up_value = unfold.split([self.flat_dim, self.value_dim], 1)  # (N, ..., L) each
        # Uk_n' q_n
        q_latent = einsum(flat, up_key, "b s n a, n a l -> b s n l")
        q = torch.cat([q_latent, rope_BSNR], -1)
        # The cache divides scores by the root of this width; they should be divided by that of the unfolded query.
        wider = q.shape[-1] / (self.flat_dim + self.rope_dim)
        attended = cache.attend(q * wider**0.5, torch.cat([latent, key], -1), None)
        # Uv_n sum_j P_j c_j
        mean_latent = attended[..., : self.latent]
        return einsum(mean_latent, up_value, "b s n l, n a l -> b s n a")
