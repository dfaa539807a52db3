"""Causal grouped-query attention that never holds the full score matrix (no section of its own in the paper).

    P_i = softmax over j of (q_i . k_j * A^-1/2),  j <= i and document_j = document_i;   out_i = sum_j P_ij v_j

`attention` is the plain form: one masked softmax, and the oracle. `flash_attention` walks the queries in chunks, cuts
keys and values at the diagonal, keeps no scores at all and recomputes P, chunk by chunk, in the backward pass:

    dV = P' dO,   dP = dO V',   dS = P * (dP - rowsum(dO * O)),   dQ = dS K,   dK = dS' Q

Choices. The query heads that share a key/value head are stacked as rows of one product, so K and V are never repeated.
Packed documents need no second code path: a chunk starts at the first key of its oldest document.
"""

import torch
import torch.nn.functional as F

CHUNK = 64
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


def _first_keys(documents_BS, S):
    """For each chunk of queries, the first key any of them may see: 0, or where the oldest open document starts."""
    starts = range(0, S, CHUNK)
    if documents_BS is None:
        return [0 for _ in starts]
    changed = documents_BS[:, 1:] != documents_BS[:, :-1]
    index = torch.arange(1, S, device=documents_BS.device) * changed
    begin_BS = F.pad(index, (1, 0)).cummax(1).values
    return begin_BS.min(0).values[list(starts)].tolist()


def _chunk_scores(q, k, documents_BS, start, first, scale):
    """Masked scores of one chunk of queries, (B, M, G, rows, keys), for queries from `start`, keys from `first`."""
    B, M, G, rows, A = q.shape
    end = start + rows
    scores = (q.reshape(B, M, G * rows, A) @ k[:, :, first:end].transpose(-1, -2)).view(B, M, G, rows, end - first)
    scores = scores.float().mul_(scale)
    diagonal = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    scores[..., start - first :].masked_fill_(diagonal, HIDDEN)
    if documents_BS is not None:
        same = visible(documents_BS, slice(start, end), slice(first, end))
        scores.masked_fill_(~same[:, None, None], HIDDEN)
    return scores


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSNA, k_BSMA, v_BSMA, documents_BS):
        B, S, N, A = q_BSNA.shape
        M = k_BSMA.shape[2]
        q = q_BSNA.view(B, S, M, N // M, A).permute(0, 2, 3, 1, 4)  # B M G S A
        k, v = k_BSMA.transpose(1, 2).contiguous(), v_BSMA.transpose(1, 2).contiguous()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.firsts = _first_keys(documents_BS, S)
        for start, first in zip(range(0, S, CHUNK), ctx.firsts, strict=True):
            end = min(start + CHUNK, S)
            scores = _chunk_scores(q[:, :, :, start:end], k, documents_BS, start, first, A**-0.5)
            weights = scores.softmax(-1).to(q.dtype)
            rows = weights.flatten(2, 3) @ v[:, :, first:end]
            out[:, :, :, start:end] = rows.view(B, M, N // M, end - start, A)
        ctx.save_for_backward(q_BSNA, k, v, out, documents_BS)
        return out.permute(0, 3, 1, 2, 4).reshape(B, S, N, A)

    @staticmethod
    def backward(ctx, grad_BSNA):
        q_BSNA, k, v, out, documents_BS = ctx.saved_tensors
        B, S, N, A = q_BSNA.shape
        M, G = k.shape[1], N // k.shape[1]
        q = q_BSNA.view(B, S, M, G, A).permute(0, 2, 3, 1, 4)
        grad = grad_BSNA.reshape(B, S, M, G, A).permute(0, 2, 3, 1, 4).contiguous()
        inner = (grad * out).sum(-1, keepdim=True).float()
        dq = torch.empty_like(out)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for start, first in zip(range(0, S, CHUNK), ctx.firsts, strict=True):
            end = min(start + CHUNK, S)
            rows, keys = slice(start, end), slice(first, end)
            q_rows = q[:, :, :, rows].reshape(B, M, -1, A)
            grad_rows = grad[:, :, :, rows].reshape(B, M, -1, A)
            scores = _chunk_scores(q[:, :, :, rows], k, documents_BS, start, first, A**-0.5)
            weights = scores.softmax(-1).flatten(2, 3)
            dv[:, :, keys] += weights.to(q.dtype).transpose(-1, -2) @ grad_rows
            dscores = (grad_rows @ v[:, :, keys].transpose(-1, -2)).float()
            dscores.sub_(inner[:, :, :, rows].reshape(B, M, -1, 1)).mul_(weights).mul_(A**-0.5)
            dscores = dscores.to(q.dtype)
            dq[:, :, :, rows] = (dscores @ k[:, :, keys]).view(B, M, G, end - start, A)
            dk[:, :, keys] += dscores.transpose(-1, -2) @ q_rows
        dq = dq.permute(0, 3, 1, 2, 4).reshape(B, S, N, A)
        return dq, dk.transpose(1, 2), dv.transpose(1, 2), None


def flash_attention(q_BSNA, k_BSMA, v_BSMA, documents_BS=None):
    """The same as `attention`, in memory linear in S. Same arguments and result."""
    return _Flash.apply(q_BSNA.contiguous(), k_BSMA, v_BSMA, documents_BS)
