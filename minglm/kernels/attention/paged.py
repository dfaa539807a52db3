"""Attention over a paged key/value cache (no section of its own in the paper).

    out_i = sum over slots c <= position_i of softmax_c(q_i . k_c * A^-1/2) v_c

Slot c of a sequence is row c % size of the block that its table names at c // size. One rule, "slot <= position",
serves prefill, prefill in chunks, decoding and the check of drafted tokens, and hides slots that are stale or not yet
written.

The reference is `attend_slots` (`eager.py`), over keys and values in order. `gathered` copies each row's blocks into
order and treats the query heads that share a key/value head as rows of one product. Few queries a row, as in decoding,
are two batched products: that was measured twice as fast on a CPU as PyTorch's fused attention, which long prompts get
because it does not hold their scores. `in_place` is the Triton form, which reads the blocks where they are and takes
positions in place of the mask.
"""

import torch
import torch.nn.functional as F

from minglm.kernels.attention.eager import MASKED_SCORE

DECODE_QUERIES = 8
"""Queries a row, up to which two batched products are used."""


class PagedRows:
    """Sequences of one pass that are read together: which rows of the store, and the positions of their queries.

    rows: int64, which (block, part, head) of the store to read, in order of (parts, B, M, blocks of a sequence). parts
    are keys and values. positions_BS: int64 (B, S). A mask is made once for all layers of a pass.
    """

    def __init__(self, rows: torch.Tensor, positions_BS: torch.Tensor) -> None:
        self.rows = rows
        self.positions_BS = positions_BS
        self._masks: dict[int, torch.Tensor] = {}

    def mask(self, slots: int, heads: int, dtype: torch.dtype, first: int = 0) -> torch.Tensor:
        """Return `slot_mask` of these positions; the same tensor for each layer that begins at the slot `first`."""
        if first not in self._masks:
            self._masks[first] = slot_mask(self.positions_BS, slots, heads, dtype, first)
        return self._masks[first]


def slot_mask(
    positions_BS: torch.Tensor, slots: int, heads: int, dtype: torch.dtype, first: int = 0
) -> torch.Tensor:
    """Return what is added to the scores: 0 for slots from `first` to the position, else MASKED_SCORE.

    heads: query heads that share a key/value head. The shape is (B, 1, S * heads, slots), or (B, 1, 1, slots) for one
    query a row.
    """
    slot = torch.arange(slots, device=positions_BS.device)
    hidden = slot > positions_BS[..., None]
    if first:
        hidden |= slot < first
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    mask = mask.masked_fill_(hidden, MASKED_SCORE)
    if mask.shape[1] > 1:  # one query a row needs no copies: the mask is the same for all its heads
        mask = mask.repeat_interleave(heads, 1)
    return mask[:, None]


def gathered(
    q_BSNA: torch.Tensor, store: torch.Tensor, sequences: PagedRows, first: int = 0
) -> torch.Tensor:
    """Attend q (B, S, N, A) over blocks of the store (blocks, 2, M, size, A); return (B, S, N, A) in q's dtype.

    A store of (blocks, 1, M, size, A) holds keys that are values too (latent attention). Slots before `first` are
    hidden. Rows of the store beyond what is written may be any.
    """
    B, S, N, A = q_BSNA.shape
    parts, M, size = store.shape[1:4]
    G = N // M
    kv = store.view(-1, size * A).index_select(0, sequences.rows).view(parts, B * M, -1, A)
    k, v = kv[0], kv[-1]
    C = k.shape[1]  # slots
    mask = sequences.mask(C, G, q_BSNA.dtype, first)

    q = (q_BSNA * A**-0.5).view(B, S, M, G, A).transpose(1, 2).reshape(B * M, -1, A)
    if S <= DECODE_QUERIES:
        scores = (q @ k.mT).view(B, M, -1, C).add_(mask)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out = weights.view(B * M, -1, C) @ v
    else:
        q, k, v = (x.view(B, M, -1, A) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return out.view(B, M, S, -1, A).transpose(1, 2).reshape(B, S, N, A)


def in_place(
    q_BSNA: torch.Tensor, store: torch.Tensor, sequences: PagedRows, first: int = 0
) -> torch.Tensor:
    """Compute `gathered` with Triton, without copying the blocks: same arguments, shapes and dtypes."""
    from minglm.kernels.attention.triton_paged import paged_attention_triton

    return paged_attention_triton(q_BSNA, store, sequences.rows, sequences.positions_BS, first)
