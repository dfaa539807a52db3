"""Causal grouped-query attention that never holds the full score matrix (no section of its own in the paper).

    P_i = softmax over j of (q_i . k_j * A^-1/2),  j <= i and document_j = document_i;   out_i = sum_j P_ij v_j

`attention` is the plain form: one masked softmax, and the oracle. `flash_attention` walks the queries in chunks, cuts
keys and values at the diagonal, keeps no scores and recomputes P, chunk by chunk, in the backward pass:

    dV = P' dO,   dP = dO V',   dS = P * (dP - rowsum(dO * O)),   dQ = dS K,   dK = dS' Q

Choices. The query heads that share a key/value head are stacked as rows of one product, so K and V are never repeated.
Packed documents need no second code path: a chunk starts at the first key of its oldest document. Where a query sees
few keys, in short rows or documents, P is no larger than what a layer keeps anyway: a CPU keeps it.
"""

import torch
import torch.nn.functional as F

from minglm.kernels.dispatch import backend

CHUNK = (
    256  # bytes that the longest chunk's numbers take in one column of its scores; see `_chunks`
)
WIDEST = 256  # dimensions of a head that the Triton form has tiles for
TILE = (
    32  # keys; products come in few shapes then, for each of which a CPU compiles one in bfloat16
)
KEEP = 512  # bytes of P for each query on average, up to which a CPU keeps P for the backward pass
HIDDEN = -1e4  # score of a pair that must not see each other; finite, because exp(-inf) takes a slow path on CPUs


def visible(positions_or_documents_S, rows, columns):
    """Mask of the pairs (query, key) in the same document, from ids (B, S) and two slices; shape (B, rows, columns)."""
    return positions_or_documents_S[:, rows, None] == positions_or_documents_S[:, None, columns]


def attention(q_BSNA, k_BSMA, v_BSMA, documents_BS=None):
    """Plain causal attention. q (B, S, N, A); k, v (B, S, M, A), N a multiple of M; returns (B, S, N, A).

    documents_BS: optional integer ids; a position sees only earlier positions of its own document.
    """
    B, S, N, A = q_BSNA.shape
    M = k_BSMA.shape[2]
    q = q_BSNA.reshape(B, S, M, N // M, A)
    scores = torch.einsum("bsmga,bcma->bmgsc", q, k_BSMA) * A**-0.5
    allowed = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()[None]
    if documents_BS is not None:
        allowed = allowed & visible(documents_BS, slice(None), slice(None))
    scores = scores.float().masked_fill(~allowed[:, None, None], float("-inf"))
    weights = scores.softmax(-1).to(q.dtype)
    return torch.einsum("bmgsc,bcma->bsmga", weights, v_BSMA).reshape(B, S, N, A)


def _chunks(B, M, S, documents_BS, itemsize):
    """(slice of queries, first key that any of them may see) of each chunk: key 0, or where the oldest document starts.

    A short chunk computes fewer scores above the diagonal, a long one needs fewer calls: half of CHUNK is better where
    a batch of sequences makes each call large. The first key is rounded down to a multiple of TILE, see there.
    """
    length = max(1, CHUNK // itemsize // (1 if B * M < 4 else 2))
    starts = range(0, S, length)
    firsts = [0] * len(starts)
    if documents_BS is not None:
        changed = documents_BS[:, 1:] != documents_BS[:, :-1]
        index = torch.arange(1, S, device=documents_BS.device) * changed
        begin_BS = F.pad(index, (1, 0)).cummax(1).values
        firsts = (begin_BS.min(0).values[list(starts)] // TILE * TILE).tolist()
    return [
        (slice(start, min(start + length, S)), first)
        for start, first in zip(starts, firsts, strict=True)
    ]


def _rows(x_BSNA, M):
    """(B, S, N, A) to (B M, S G, A): the G query heads that share a key/value head become rows of one matrix."""
    B, S, N, A = x_BSNA.shape
    return x_BSNA.reshape(B, S, M, N // M, A).transpose(1, 2).reshape(B * M, -1, A)


def _heads(x, B, S):
    """The inverse of `_rows`: (B M, S G, A) to (B, S, N, A)."""
    return (
        x.view(B, x.shape[0] // B, S, -1, x.shape[2]).transpose(1, 2).reshape(B, S, -1, x.shape[2])
    )


def _causal(S, q):
    """The causal mask of every chunk, as numbers to add: its first position is in column S."""
    longest = CHUNK // q.itemsize
    return torch.full((longest, S + longest), HIDDEN, dtype=q.dtype, device=q.device).triu_(S + 1)


def _weights(q, k, causal, documents_BS, at, first):
    """Softmax weights (B M, queries, keys) of one chunk: queries at `at`, keys from `first`.

    The product is added to the mask: one pass over the scores, where scaling them and masking them twice were three.
    """
    S, G = k.shape[1], q.shape[1] // k.shape[1]
    left, keys = S - at.start, slice(first, at.stop)
    mask = causal[None, : at.stop - at.start, left + first : left + at.stop]
    if documents_BS is not None:
        mask = mask.masked_fill(documents_BS[:, at, None] != documents_BS[:, None, keys], HIDDEN)
    mask = mask[:, None, :, None].expand(-1, len(k) // len(mask), -1, G, -1)  # B M queries G keys
    scores = mask.clone(memory_format=torch.contiguous_format).view(len(k), -1, mask.shape[-1])
    scores.baddbmm_(q[:, at.start * G : at.stop * G], k[:, keys].mT)
    return scores.softmax(-1)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSNA, k_BSMA, v_BSMA, documents_BS):
        B, S, N, A = q_BSNA.shape
        M, G = k_BSMA.shape[2], N // k_BSMA.shape[2]
        q, k, v = (_rows(x, M) for x in (q_BSNA, k_BSMA * A**-0.5, v_BSMA))
        causal, out = _causal(S, q), torch.empty_like(q)
        ctx.chunks, kept = _chunks(B, M, S, documents_BS, q.itemsize), []
        seen = sum((at.stop - at.start) * (at.stop - first) for at, first in ctx.chunks)
        keep = any(ctx.needs_input_grad) and not q.is_cuda and seen * q.itemsize <= KEEP * S
        for at, first in ctx.chunks:
            weights = _weights(q, k, causal, documents_BS, at, first)
            out[:, at.start * G : at.stop * G] = weights @ v[:, first : at.stop]
            if keep:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, documents_BS, *kept)
        return _heads(out, B, S)

    @staticmethod
    def backward(ctx, grad_BSNA):
        q, k, v, documents_BS, *kept = ctx.saved_tensors
        B, S, N, A = grad_BSNA.shape
        M, G = len(k) // B, q.shape[1] // S
        grad, causal = _rows(grad_BSNA, M), _causal(S, q)
        wide = torch.promote_types(q.dtype, torch.float32)  # of the sums over chunks
        dq, dk, dv = (
            torch.empty_like(q),
            torch.zeros_like(k, dtype=wide),
            torch.zeros_like(v, dtype=wide),
        )
        for i, (at, first) in enumerate(ctx.chunks):
            rows, keys = slice(at.start * G, at.stop * G), slice(first, at.stop)
            weights = kept[i] if kept else _weights(q, k, causal, documents_BS, at, first)
            dv[:, keys] += weights.mT @ grad[:, rows]
            dweights = grad[:, rows] @ v[:, keys].mT
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, q.dtype)
            dq[:, rows] = dscores @ k[:, keys]
            dk[:, keys] += dscores.mT @ q[:, rows]
        return *(_heads(x, B, S).to(q.dtype) for x in (dq, dk.mul_(A**-0.5), dv)), None


def flash_attention(q_BSNA, k_BSMA, v_BSMA, documents_BS=None):
    """The same as `attention`, in memory linear in S. Same arguments and result, for documents that are runs of one id.

    `minglm.kernels.dispatch` chooses the form; Triton's takes heads of up to WIDEST dimensions.
    """
    if q_BSNA.shape[3] <= WIDEST and backend(q_BSNA) == "triton":
        from minglm.kernels.attention.triton_layer import flash_attention_triton

        return flash_attention_triton(q_BSNA, k_BSMA, v_BSMA, documents_BS)
    return _Flash.apply(q_BSNA, k_BSMA, v_BSMA, documents_BS)
