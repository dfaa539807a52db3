"""QK-norm and rotary embedding in one pass: the function that attention calls (paper 2.1).

The reference (`eager.py`) is four operations on each of queries and keys, each of which moves them through memory on a
GPU. The Triton form reads and writes them once. `minglm.kernels.dispatch` chooses the form.
"""

import torch

from minglm.kernels.dispatch import Operation, select


def qk_norm_rope(
    q_BSNA: torch.Tensor,
    k_BSMA: torch.Tensor,
    q_weight_A: torch.Tensor | None,
    k_weight_A: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and rotate queries (B, S, N, A) and keys (B, S, M, A); return both in the same shapes and dtype.

    Weights (A,) float32, or None for a model without QK-norm; cos and sin (B or 1, S, 1, R/2) float32, of
    `minglm.model.rope.angles`. Differentiable in all but the angles.
    """
    compute = select(Operation.QK_NORM_ROPE, q_BSNA, qk_norm=q_weight_A is not None)
    return compute(q_BSNA, k_BSMA, q_weight_A, k_weight_A, cos, sin, eps)
