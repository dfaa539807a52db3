"""QK-norm and rotary embedding with their backward pass written out, for training on a CPU (paper 2.1).

The transpose of a rotation is the rotation by the negative angle, so with g the gradient of y, u = x / sqrt(...) and
s = 1 / sqrt(...):

    dm_i = g_i cos_i - sign_i g_p(i) sin_i;   dx = s (w dm - u mean(w dm u));   dweight = sum over tokens and heads dm u

It computes in float32 throughout and rounds once, at the end, where the reference in bfloat16 rounds after each step.
The rotation is y = x c + swap(x) s over whole heads, with c one and s zero where nothing rotates: a CPU works through
long rows, and R/2 numbers at a time are short ones.
"""

from typing import Any

import torch

from minglm.kernels.norm.fused import normalize, normalize_backward, widen


def _rotate_wide(x_BSNA: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate float32 heads (B, S, N, A); a negative `sin` rotates back. Factors of whole heads make its rows long."""
    half = cos.shape[-1]
    heads = x_BSNA.shape[2]
    ones = cos.new_ones(*cos.shape[:-1], x_BSNA.shape[-1] - 2 * half)
    c_BSNA = torch.cat((cos, cos, ones), -1).expand(-1, -1, heads, -1).contiguous()
    s_BSNR = torch.cat((-sin, sin), -1).expand(-1, -1, heads, -1).contiguous()
    swapped = torch.cat((x_BSNA[..., half : 2 * half], x_BSNA[..., :half]), -1)  # m_p(i)
    y_BSNA = x_BSNA * c_BSNA
    y_BSNA[..., : 2 * half] += swapped.mul_(s_BSNR)
    return y_BSNA


class _NormRope(torch.autograd.Function):
    """QK-norm and rotation of queries, or of keys."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BSNA: torch.Tensor,
        weight_A: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        wide_x, wide_weight = widen(x_BSNA, weight_A)
        out_BSNA, scale = normalize(wide_x, wide_weight, eps)
        ctx.save_for_backward(x_BSNA, weight_A, scale, cos, sin)
        return _rotate_wide(out_BSNA, cos, sin).to(x_BSNA.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_BSNA: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x_BSNA, weight_A, scale, cos, sin = ctx.saved_tensors
        grad, x, weight = widen(grad_BSNA, x_BSNA, weight_A)
        dm = _rotate_wide(grad, cos, -sin)
        dx, dweight = normalize_backward(dm, x, weight, scale)
        return dx.to(x_BSNA.dtype), dweight.to(weight_A.dtype), None, None, None


def qk_norm_rope_fused(
    q_BSNA: torch.Tensor,
    k_BSMA: torch.Tensor,
    q_weight_A: torch.Tensor,
    k_weight_A: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and rotate queries (B, S, N, A) and keys (B, S, M, A) of a model with QK-norm; shapes and dtypes stay.

    Weights (A,) float32; cos and sin (B or 1, S, 1, R/2) float32. Differentiable in all but the angles.
    """
    q_BSNA = _NormRope.apply(q_BSNA, q_weight_A, cos, sin, eps)
    k_BSMA = _NormRope.apply(k_BSMA, k_weight_A, cos, sin, eps)
    return q_BSNA, k_BSMA
