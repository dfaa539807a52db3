"""QK-norm and rotary embedding of queries and keys, in plain PyTorch: the reference (paper 2.1).

    m = weight * x / sqrt(mean(x^2) + eps) over each head;   y_i = m_i cos_i + sign_i m_p(i) sin_i for i < R

R dimensions of each head rotate (half of them in GLM-4.5), the rest pass through. Half-split layout: the partner p(i)
of dimension i is i + R/2 with sign -1 for i < R/2, and i - R/2 with sign +1 for the others.
"""

import torch

from minglm.kernels.norm.eager import norm


def rotate(x_BSNA: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dimensions of every head: x (B, S, N, A), cos and sin (B or 1, S, 1, R/2); x's shape, dtype."""
    half = cos.shape[-1]
    a, b, rest = x_BSNA.split([half, half, x_BSNA.shape[-1] - 2 * half], -1)
    cos, sin = cos.to(x_BSNA.dtype), sin.to(x_BSNA.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


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
    if q_weight_A is not None and k_weight_A is not None:
        q_BSNA, _ = norm(q_BSNA, q_weight_A, eps)
        k_BSMA, _ = norm(k_BSMA, k_weight_A, eps)
    heads = (q_BSNA.shape[2], k_BSMA.shape[2])
    # Queries and keys rotate by the same angles, so they go through it together.
    q_BSNA, k_BSMA = rotate(torch.cat((q_BSNA, k_BSMA), 2), cos, sin).split(heads, 2)
    return q_BSNA, k_BSMA
