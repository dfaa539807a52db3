"""Attention over whole sequences and over the engine's cache: the functions that the model and the engine call.

`eager.py` has the equation and the reference of both. `minglm.kernels.dispatch` chooses the form.
"""

import torch

from minglm.kernels.attention.paged import PagedRows
from minglm.kernels.attention.shared import SharedPrompts
from minglm.kernels.dispatch import Operation, select

__all__ = ["Documents", "PagedRows", "SharedPrompts", "flash_attention", "paged_attention"]


Documents = torch.Tensor | SharedPrompts
"""What says which text a position belongs to: ids (B, S), or how texts that share prompts lie in a row."""


def flash_attention(
    q_BSNA: torch.Tensor,
    k_BSMA: torch.Tensor,
    v_BSMA: torch.Tensor,
    documents_BS: Documents | None = None,
) -> torch.Tensor:
    """Attend q (B, S, N, A) over k and v (B, S, M, A), N a multiple of M; return (B, S, N, A) in q's dtype.

    The memory is linear in S. documents_BS: optional integer ids (B, S), of which equal ones are next to each other; a
    position sees only earlier positions of its own document. `SharedPrompts` in their place: B is 1, and texts that
    share prompts lie in the row. Differentiable in q, k and v.
    """
    if isinstance(documents_BS, SharedPrompts):
        attend = select(Operation.ATTENTION_TO_PROMPTS, q_BSNA, head_dim=q_BSNA.shape[3])
    else:
        attend = select(Operation.ATTENTION, q_BSNA, head_dim=q_BSNA.shape[3])
    return attend(q_BSNA, k_BSMA, v_BSMA, documents_BS)


def paged_attention(
    q_BSNA: torch.Tensor, store: torch.Tensor, sequences: PagedRows, first: int = 0
) -> torch.Tensor:
    """Attend q (B, S, N, A) over the slots of each sequence in a paged store; return (B, S, N, A) in q's dtype.

    store: (blocks, 2, M, size, A), keys first, or (blocks, 1, M, size, A) where keys are values too. Slots from `first`
    to a query's position are seen. `minglm.kernels.attention.paged` has the layout.
    """
    attend = select(Operation.PAGED_ATTENTION, q_BSNA, head_dim=q_BSNA.shape[3])
    return attend(q_BSNA, store, sequences, first)
