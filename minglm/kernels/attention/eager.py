"""Causal grouped-query attention in plain PyTorch: the reference of every other form (no section in the paper).

    P_i = softmax over j of (q_i . k_j * A^-1/2),  j <= i and document_j = document_i;   out_i = sum_j P_ij v_j

`attention` sees whole sequences, `attention_to_prompts` those that share prompts in one row. `attend_slots` sees queries
at given positions and keys in the slots of a cache: the same equation, with "slot <= position" in place of "j <= i".
"""

import torch
from einops import rearrange

from minglm.kernels.attention.shared import SharedPrompts

MASKED_SCORE = -1e4
"""Score of a pair that must not see each other; finite, because exp(-inf) takes a slow path on CPUs."""


def attention(
    q_BSNA: torch.Tensor,
    k_BSMA: torch.Tensor,
    v_BSMA: torch.Tensor,
    documents_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend q (B, S, N, A) over k and v (B, S, M, A), N a multiple of M; return (B, S, N, A) in q's dtype.

    documents_BS: optional integer ids; a position sees only earlier positions of its own document.
    """
    S = q_BSNA.shape[1]
    allowed_BSC = torch.ones(1, S, S, dtype=torch.bool, device=q_BSNA.device).tril()
    if documents_BS is not None:
        same_document = documents_BS[:, :, None] == documents_BS[:, None, :]
        allowed_BSC = allowed_BSC & same_document
    return _attend(q_BSNA, k_BSMA, v_BSMA, allowed_BSC)


def attention_to_prompts(
    q_TNA: torch.Tensor, k_TMA: torch.Tensor, v_TMA: torch.Tensor, shared: SharedPrompts
) -> torch.Tensor:
    """Attend q (1, T, N, A) over k and v (1, T, M, A): its own text up to it, and its prompt; return q's shape."""
    place_T = torch.arange(q_TNA.shape[1], device=q_TNA.device)
    own_TC = (place_T >= shared.starts_T[:, None]) & (place_T <= place_T[:, None])
    begin_T, end_T = shared.prompt_ranges.unbind(1)
    prompt_TC = (place_T >= begin_T[:, None]) & (place_T < end_T[:, None])
    return _attend(q_TNA, k_TMA, v_TMA, (own_TC | prompt_TC)[None])


def _attend(
    q_BSNA: torch.Tensor, k_BSMA: torch.Tensor, v_BSMA: torch.Tensor, allowed_BSC: torch.Tensor
) -> torch.Tensor:
    """Attend q over the positions of k and v that each query is allowed to see."""
    A = q_BSNA.shape[3]
    M = k_BSMA.shape[2]
    q = rearrange(q_BSNA, "b s (m g) a -> b s m g a", m=M)  # G query heads share a key/value head
    scores = torch.einsum("bsmga,bcma->bmgsc", q, k_BSMA) * A**-0.5
    scores = scores.float().masked_fill(~allowed_BSC[:, None, None], float("-inf"))

    weights = scores.softmax(-1).to(q.dtype)  # P
    out = torch.einsum("bmgsc,bcma->bsmga", weights, v_BSMA)
    return rearrange(out, "b s m g a -> b s (m g) a")


def attend_slots(
    q_BSNA: torch.Tensor, k_BMCA: torch.Tensor, v_BMCA: torch.Tensor, positions_BS: torch.Tensor
) -> torch.Tensor:
    """Attend q (B, S, N, A) at integer positions (B, S) over the slots of k and v (B, M, C, A); return (B, S, N, A).

    Slot c of a sequence is at index c, and a query sees the slots up to its position.
    """
    _, S, _, A = q_BSNA.shape
    M, C = k_BMCA.shape[1:3]
    q = rearrange(q_BSNA, "b s (m g) a -> b m (g s) a", m=M)
    scores = rearrange(q @ k_BMCA.mT, "b m (g s) c -> b m g s c", s=S).float() * A**-0.5

    hidden = torch.arange(C, device=q.device) > positions_BS[..., None]
    scores = scores.masked_fill_(hidden[:, None, None], MASKED_SCORE)
    weights = scores.softmax(-1).to(q.dtype)

    out = rearrange(weights, "b m g s c -> b m (g s) c") @ v_BMCA
    return rearrange(out, "b m (g s) a -> b s (m g) a", s=S)
