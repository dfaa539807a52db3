"""Grouped-query attention with many heads, partial rotation and QK-norm (paper 2.1).

    q, k, v = Wq x + bq, Wk x + bk, Wv x + bv;   q, k = rope(norm(q)), rope(norm(k));   out = Wo attend(q, k, v)

Choices. N * A exceeds the width (96 heads of 128 on a width of 5120): the paper found that more heads do not lower the
loss but help reasoning. QK-norm is an RMSNorm over each head, one weight vector for all heads, before the rotation; it
bounds the attention logits (GLM-4.5 has it, Air does not). `attend` is a plain attribute: another implementation, for
context parallelism say, is put there from outside and the file knows nothing of it.
"""

import torch
from torch import nn

from minglm.kernels.flash_attention import HIDDEN, flash_attention
from minglm.model.layers import Linear, RMSNorm
from minglm.model.rope import rotate


def attend_cached(q_BSNA, k_BMCA, v_BMCA, positions_BS):
    """Attention over a cache in which slot c holds position c: a query at position p sees slots 0 to p.

    The one rule serves prefill, chunked prefill and decoding, and hides slots that are stale or not yet written.
    q (B, S, N, A); k, v (B, M, C, A); positions int (B, S). Returns (B, S, N, A).
    """
    B, S, N, A = q_BSNA.shape
    M, C = k_BMCA.shape[1:3]
    q = q_BSNA.view(B, S, M, N // M, A).permute(0, 2, 3, 1, 4).reshape(B, M, -1, A)
    scores = (q @ k_BMCA.mT).view(B, M, N // M, S, C).float() * A**-0.5
    hidden = torch.arange(C, device=q.device) > positions_BS[..., None]
    weights = scores.masked_fill_(hidden[:, None, None], HIDDEN).softmax(-1).to(q.dtype)
    out = weights.view(B, M, -1, C) @ v_BMCA
    return out.view(B, M, N // M, S, A).permute(0, 3, 1, 2, 4).reshape(B, S, N, A)


class Attention(nn.Module):
    """One attention layer; parameter names are those of the released checkpoints."""

    def __init__(self, config):
        super().__init__()
        D, N, M, A = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim = N, M, A
        self.q_proj = Linear(D, N * A, bias=config.attention_bias)
        self.k_proj = Linear(D, M * A, bias=config.attention_bias)
        self.v_proj = Linear(D, M * A, bias=config.attention_bias)
        self.o_proj = Linear(N * A, D)
        self.q_norm = RMSNorm(A, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(A, config.rms_norm_eps) if config.use_qk_norm else None
        self.attend = flash_attention

    def queries_keys(self, x_BSD, rotation):
        """Rotated queries (B, S, N, A) and keys (B, S, M, A): what enters the dot product."""
        q = self.q_proj(x_BSD).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_proj(x_BSD).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rotation), rotate(k, *rotation)

    def forward(self, x_BSD, rotation, documents_BS=None, cache=None):
        """x (B, S, D) to (B, S, D).

        rotation: cos and sin of `minglm.model.rope.angles`. documents_BS: ids that attention must not cross.
        cache: an object with `.write(k, v) -> (k_BMCA, v_BMCA)` and `.positions_BS`; with it, attention is over all
        positions held there.
        """
        q_BSNA, k_BSMA = self.queries_keys(x_BSD, rotation)
        v_BSMA = self.v_proj(x_BSD).unflatten(-1, (self.kv_heads, self.head_dim))
        if cache is None:
            out_BSNA = self.attend(q_BSNA, k_BSMA, v_BSMA, documents_BS)
        else:
            k_BMCA, v_BMCA = cache.write(k_BSMA, v_BSMA)
            out_BSNA = attend_cached(q_BSNA, k_BMCA, v_BMCA, cache.positions_BS)
        return self.o_proj(out_BSNA.flatten(2))
