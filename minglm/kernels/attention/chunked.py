"""Attention in chunks of queries, in memory linear in S: what runs without Triton (no section in the paper).

    P = softmax(Q K' * A^-1/2 + mask);   O = P V
    dV = P' dO,   dP = dO V',   dS = P * (dP - rowsum(dO * O)),   dQ = dS K,   dK = dS' Q

The queries are walked in chunks, keys and values are cut at the diagonal, no scores are kept, and the backward pass
computes P again chunk by chunk. The equation with its symbols is in `eager.py`.

Choices. The query heads that share a key/value head are stacked as rows of one product, so K and V are never repeated.
Packed documents need no second code path: a chunk starts at the first key of its oldest document. Where a query sees
few keys, in short rows or documents, P is no larger than what a layer keeps anyway, and a CPU keeps it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from minglm.kernels.attention.eager import MASKED_SCORE

CHUNK_COLUMN_BYTES = 256
"""Bytes of one score column in the largest chunk; see `_chunks`."""

KEY_TILE = 32
"""The first key of a chunk is a multiple of this. A CPU compiles a product in bfloat16 for each new shape."""

SAVE_SCORES_BYTES = 512
"""Save P for the backward pass on a CPU if it takes no more bytes per query than this, on average."""


class Chunk(NamedTuple):
    """Queries that are computed together, and the first key that any of them sees."""

    queries: slice
    first_key: int


def document_starts(documents_BS: torch.Tensor) -> torch.Tensor:
    """Return the first position of each position's document, int64 (B, S); the ids are as in `chunked_attention`."""
    S = documents_BS.shape[1]
    changed = documents_BS[:, 1:] != documents_BS[:, :-1]
    index = torch.arange(1, S, device=documents_BS.device) * changed
    return F.pad(index, (1, 0)).cummax(1).values


def _chunks(
    B: int, M: int, S: int, documents_BS: torch.Tensor | None, itemsize: int
) -> list[Chunk]:
    """Cut S queries into chunks. The first key is 0, or where the oldest document of the chunk starts.

    A short chunk computes fewer scores above the diagonal, a long one needs fewer calls: half of CHUNK_COLUMN_BYTES is
    better where a batch of sequences makes each call large. The first key is rounded down to a multiple of KEY_TILE.
    """
    length = max(1, CHUNK_COLUMN_BYTES // itemsize // (1 if B * M < 4 else 2))
    starts = range(0, S, length)
    first_keys = [0] * len(starts)
    if documents_BS is not None:
        oldest = document_starts(documents_BS).min(0).values[list(starts)]
        first_keys = (oldest // KEY_TILE * KEY_TILE).tolist()
    return [
        Chunk(slice(start, min(start + length, S)), first_key)
        for start, first_key in zip(starts, first_keys, strict=True)
    ]


def _rows(x_BSNA: torch.Tensor, M: int) -> torch.Tensor:
    """(B, S, N, A) to (B M, S G, A): the G query heads that share a key/value head become rows of one matrix."""
    B, S, N, A = x_BSNA.shape
    return x_BSNA.reshape(B, S, M, N // M, A).transpose(1, 2).reshape(B * M, -1, A)


def _heads(x: torch.Tensor, B: int, S: int) -> torch.Tensor:
    """Undo `_rows`: (B M, S G, A) to (B, S, N, A)."""
    BM, _, A = x.shape
    return x.view(B, BM // B, S, -1, A).transpose(1, 2).reshape(B, S, -1, A)


def _causal_mask(S: int, q: torch.Tensor) -> torch.Tensor:
    """Return numbers to add to the scores of any chunk; the column of a chunk's first position is column S."""
    longest = CHUNK_COLUMN_BYTES // q.itemsize
    shape = (longest, S + longest)
    return torch.full(shape, MASKED_SCORE, dtype=q.dtype, device=q.device).triu_(S + 1)


def _weights(
    q: torch.Tensor,
    k: torch.Tensor,
    causal_mask: torch.Tensor,
    documents_BS: torch.Tensor | None,
    chunk: Chunk,
) -> torch.Tensor:
    """Return the softmax weights P (B M, queries, keys) of one chunk.

    The product is added to the mask: one pass over the scores, where scaling them and masking them twice would be
    three.
    """
    S = k.shape[1]
    G = q.shape[1] // S
    start, stop = chunk.queries.start, chunk.queries.stop
    keys = slice(chunk.first_key, stop)

    left = S - start  # the mask's column of key 0 for this chunk
    mask = causal_mask[None, : stop - start, left + chunk.first_key : left + stop]
    if documents_BS is not None:
        other_document = documents_BS[:, chunk.queries, None] != documents_BS[:, None, keys]
        mask = mask.masked_fill(other_document, MASKED_SCORE)

    # The mask is the same for the M heads of a sequence and the G queries that share a head: B, M, queries, G, keys.
    mask = mask[:, None, :, None].expand(-1, len(k) // len(mask), -1, G, -1)
    scores = mask.clone(memory_format=torch.contiguous_format).view(len(k), -1, mask.shape[-1])
    scores.baddbmm_(q[:, start * G : stop * G], k[:, keys].mT)
    return scores.softmax(-1)


class _ChunkedAttention(torch.autograd.Function):
    """Attention as in the module's docstring, chunk by chunk in both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSNA: torch.Tensor,
        k_BSMA: torch.Tensor,
        v_BSMA: torch.Tensor,
        documents_BS: torch.Tensor | None,
    ) -> torch.Tensor:
        B, S, N, A = q_BSNA.shape
        M = k_BSMA.shape[2]
        G = N // M
        q = _rows(q_BSNA, M)
        k = _rows(k_BSMA * A**-0.5, M)  # the scale is in the keys
        v = _rows(v_BSMA, M)
        causal_mask = _causal_mask(S, q)
        chunks = _chunks(B, M, S, documents_BS, q.itemsize)

        scores = sum(
            (c.queries.stop - c.queries.start) * (c.queries.stop - c.first_key) for c in chunks
        )
        few_scores = scores * q.itemsize <= SAVE_SCORES_BYTES * S
        save_weights = any(ctx.needs_input_grad) and not q.is_cuda and few_scores
        saved: list[torch.Tensor] = []
        out = torch.empty_like(q)
        for chunk in chunks:
            rows = slice(chunk.queries.start * G, chunk.queries.stop * G)
            keys = slice(chunk.first_key, chunk.queries.stop)
            weights = _weights(q, k, causal_mask, documents_BS, chunk)
            out[:, rows] = weights @ v[:, keys]  # O = P V
            if save_weights:
                saved.append(weights)
        ctx.chunks = chunks
        ctx.save_for_backward(q, k, v, documents_BS, *saved)
        return _heads(out, B, S)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_BSNA: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, documents_BS, *saved = ctx.saved_tensors
        B, S, _, A = grad_BSNA.shape
        M = len(k) // B
        G = q.shape[1] // S
        grad = _rows(grad_BSNA, M)  # dO
        causal_mask = _causal_mask(S, q)

        wide = torch.promote_types(q.dtype, torch.float32)  # of the sums over chunks
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k, dtype=wide)
        dv = torch.zeros_like(v, dtype=wide)
        for i, chunk in enumerate(ctx.chunks):
            rows = slice(chunk.queries.start * G, chunk.queries.stop * G)
            keys = slice(chunk.first_key, chunk.queries.stop)
            weights = saved[i] if saved else _weights(q, k, causal_mask, documents_BS, chunk)
            dv[:, keys] += weights.mT @ grad[:, rows]  # dV = P' dO
            dweights = grad[:, rows] @ v[:, keys].mT  # dP = dO V'
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, q.dtype)  # dS
            dq[:, rows] = dscores @ k[:, keys]  # dQ = dS K, the scale is in K
            dk[:, keys] += dscores.mT @ q[:, rows]  # dK = dS' Q
        dk = dk.mul_(A**-0.5)
        gradients: Sequence[torch.Tensor] = [_heads(x, B, S).to(q.dtype) for x in (dq, dk, dv)]
        return *gradients, None


def chunked_attention(
    q_BSNA: torch.Tensor,
    k_BSMA: torch.Tensor,
    v_BSMA: torch.Tensor,
    documents_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `attention` of `eager.py` in memory linear in S: q and the result (B, S, N, A), k and v (B, S, M, A).

    documents_BS: integer ids (B, S), of which equal ones are next to each other.
    """
    return _ChunkedAttention.apply(q_BSNA, k_BSMA, v_BSMA, documents_BS)
