"""Attention over a paged key/value cache (no section of its own in the paper).

    out_i = sum over slots c <= position_i of softmax_c(q_i . k_c * A^-1/2) v_c

Slot c of a sequence is row c % size of the block that its table names at c // size. One rule, "slot <= position",
serves prefill, prefill in chunks, decoding and the check of drafted tokens, and hides slots that are stale or not yet
written.

`attend_slots` is the plain form, over keys and values in order; the oracle. `paged_attention` gathers each row's blocks
and treats the query heads that share a key/value head as rows of one product. Few queries a row, as in decoding, are
two batched products: that was measured twice as fast on a CPU as PyTorch's fused attention, which long prompts get
because it does not hold their scores. The Triton form (`paged_attention_triton.py`) reads the blocks where they lie and
takes positions in place of the mask; `minglm.inference.pages` calls it where Triton runs.
"""

import torch
import torch.nn.functional as F

from minglm.kernels.attention.eager import HIDDEN

FEW = 8  # queries a row


def attend_slots(q_BSNA, k_BMCA, v_BMCA, positions_BS):
    """Plain form. q (B, S, N, A); k, v (B, M, C, A), slot c at c; positions int (B, S). Returns (B, S, N, A)."""
    B, S, N, A = q_BSNA.shape
    M, C = k_BMCA.shape[1:3]
    q = q_BSNA.view(B, S, M, N // M, A).permute(0, 2, 3, 1, 4).reshape(B, M, -1, A)
    scores = (q @ k_BMCA.mT).view(B, M, N // M, S, C).float() * A**-0.5
    hidden = torch.arange(C, device=q.device) > positions_BS[..., None]
    weights = scores.masked_fill_(hidden[:, None, None], HIDDEN).softmax(-1).to(q.dtype)
    out = weights.view(B, M, -1, C) @ v_BMCA
    return out.view(B, M, N // M, S, A).permute(0, 3, 1, 2, 4).reshape(B, S, N, A)


def slot_mask(positions_BS, slots, heads, dtype, first=0):
    """What is added to the scores, (B, 1, S * heads, slots): 0 for slots from `first` to the position, else HIDDEN."""
    slot = torch.arange(slots, device=positions_BS.device)
    hidden = slot > positions_BS[..., None]
    if first:
        hidden |= slot < first
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, HIDDEN)
    if (
        mask.shape[1] > 1
    ):  # one query for each row needs no copies: the mask is the same for all its heads
        mask = mask.repeat_interleave(heads, 1)
    return mask[:, None]


def paged_attention(q_BSNA, store, rows, mask):
    """q (B, S, N, A) over blocks of the store (blocks, 2, M, size, A); mask of `slot_mask`. Returns (B, S, N, A).

    A store of (blocks, 1, M, size, A) holds keys that serve as values too (latent attention). rows: which (block, part,
    head) of the store to read, int64, in order of (parts, B, M, blocks of a row). Rows beyond what is written may be
    any.
    """
    B, S, N, A = q_BSNA.shape
    parts, M, size = store.shape[1:4]
    kv = store.view(-1, size * A).index_select(0, rows).view(parts, B * M, -1, A)
    k, v = kv[0], kv[-1]
    q = (q_BSNA * A**-0.5).view(B, S, M, N // M, A).transpose(1, 2).reshape(B * M, -1, A)
    if S <= FEW:
        scores = (q @ k.mT).view(B, M, -1, k.shape[1]).add_(mask)
        out = scores.softmax(-1, dtype=torch.float32).to(q.dtype).view(B * M, -1, k.shape[1]) @ v
    else:
        q, k, v = (x.view(B, M, -1, A) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return out.view(B, M, S, -1, A).transpose(1, 2).reshape(B, S, N, A)
