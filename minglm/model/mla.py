"""Multi-head latent attention, the attention of GLM-4.7-Flash (not in the paper; arXiv 2405.04434, section 2.1).

    c = norm(Wkv x)  (L values),   r = rope(Wr x)  (R values, one key for all heads)
    q_n = Wq_n norm(Wqa x),  its last R dimensions rotated;   k_n = [Uk_n c ; r],   v_n = Uv_n c
    out = Wo [ attend(q_n, k_n, v_n) ];     scale (dimensions of q_n)^-1/2

All keys and values of a position are linear in c, so the cache holds c and r: 576 values a layer in GLM-4.7-Flash,
where keys and values of its 20 heads would be 10,240.

Choices. Training and scoring make keys and values of all positions and call `attend`, as `minglm.model.attention` does.
With a cache Uk moves to the query and Uv behind the sum over positions, so that both products are with c itself:

    q_n . k_n = (Uk_n' q_n) . c + q_rope . r;     sum_j P_j v_nj = Uv_n sum_j P_j c_j

So to a cache this is one key head [c ; r] that serves as value too, `cache.attend(q, k, None)`. Pairs of neighbours
rotate (`rotate_pairs`). The two inner norms have an epsilon of their own, 1e-6.
Simplified: Muon takes each projection as one matrix, though Wkv and U hold several.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minglm.kernels.attention.eager import flash_attention
from minglm.model.layers import Linear, RMSNorm
from minglm.model.rope import rotate_pairs

EPSILON = 1e-6


def attend_any_width(attend, q_BSNA, k_BSNA, v, documents_BS=None):
    """`attend` where values (B, S, N, W) are wider or narrower than keys, by zeros; returns (B, S, N, W).

    In the released model both are 256 wide and nothing is added.
    """
    extra, width = v.shape[-1] - q_BSNA.shape[-1], q_BSNA.shape[-1]
    if extra > 0:  # the wider query would be scaled by its new width
        q_BSNA = F.pad(q_BSNA * ((width + extra) / width) ** 0.5, (0, extra))
        k_BSNA = F.pad(k_BSNA, (0, extra))
    elif extra < 0:
        v = F.pad(v, (0, -extra))
    return attend(q_BSNA, k_BSNA, v, documents_BS)[..., : v.shape[-1] + min(extra, 0)]


class LatentAttention(nn.Module):
    """One MLA layer; parameter names are those of the released checkpoints. Called like `Attention`."""

    def __init__(self, config):
        super().__init__()
        D, N, L = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        self.heads, self.latent, self.value_dim = N, L, config.v_head_dim
        self.flat_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
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
        self.attend = flash_attention

    def queries(self, x_BSD, rotation):
        """The part of every query that does not rotate, and the rotated part: (B, S, N, ...) each."""
        if hasattr(self, "q_a_proj"):
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        else:
            q = self.q_proj(x_BSD)
        flat, rope_BSNR = q.unflatten(-1, (self.heads, -1)).split(
            [self.flat_dim, self.rope_dim], -1
        )
        return flat, rotate_pairs(rope_BSNR, *rotation)

    def latents(self, x_BSD, rotation):
        """What the cache holds: the normed latent (B, S, 1, L) and the rotated key (B, S, 1, R)."""
        latent, key = self.kv_a_proj_with_mqa(x_BSD)[:, :, None].split(
            [self.latent, self.rope_dim], -1
        )
        return self.kv_a_layernorm(latent), rotate_pairs(key, *rotation)

    def forward(self, x_BSD, rotation, documents_BS=None, cache=None):
        """x (B, S, D) to (B, S, D); arguments as those of `minglm.model.attention.Attention.forward`."""
        flat, rope_BSNR = self.queries(x_BSD, rotation)
        latent, key = self.latents(x_BSD, rotation)
        if cache is None:
            keys_values = self.kv_b_proj(latent[:, :, 0]).unflatten(-1, (self.heads, -1))
            k_flat, v = keys_values.split([self.flat_dim, self.value_dim], -1)
            q_BSNA = torch.cat([flat, rope_BSNR], -1)
            k_BSNA = torch.cat([k_flat, key.expand_as(rope_BSNR)], -1)
            out = attend_any_width(self.attend, q_BSNA, k_BSNA, v, documents_BS)
        else:
            up = self.kv_b_proj.weight.to(x_BSD.dtype).unflatten(0, (self.heads, -1))
            up_key, up_value = up.split([self.flat_dim, self.value_dim], 1)  # (N, ..., L) each
            q = torch.cat([torch.einsum("bsna,nal->bsnl", flat, up_key), rope_BSNR], -1)
            wider = q.shape[-1] / (
                self.flat_dim + self.rope_dim
            )  # scores are divided by the root of the width
            mean = cache.attend(q * wider**0.5, torch.cat([latent, key], -1), None)[
                ..., : self.latent
            ]
            out = torch.einsum("bsnl,nal->bsna", mean, up_value)
        return self.o_proj(out.flatten(2))
