"""QK-norm and rotary embedding of queries and keys in one pass (paper 2.1).

    m = weight * x / sqrt(mean(x^2) + eps) over each head;   y_i = m_i cos_i + sign_i m_p(i) sin_i for i < R

R dimensions of each head rotate (half of them in GLM-4.5), the rest pass through. Half-split layout: the partner p(i)
of dimension i is i + R/2 with sign -1 for i < R/2, and i - R/2 with sign +1 for the others. The transpose of a rotation
is the rotation by the negative angle, so with g the gradient of y, u = x / sqrt(...) and s = 1 / sqrt(...):

    dm_i = g_i cos_i - sign_i g_p(i) sin_i;   dx = s (w dm - u mean(w dm u));   dweight = sum over tokens and heads dm u

`qk_norm_rope` is the plain form: four operations on each of queries and keys, each of which moves them through memory
on a GPU. The Triton form reads and writes them once. It computes in float32 throughout and rounds once, at the end,
where the plain form in bfloat16 rounds after each step.

`norm_rope_by_hand` is for training on a CPU, with the backward written out, in float32 inside. The rotation is
y = x c + swap(x) s over whole heads, with c one and s zero where nothing turns: a CPU works through long rows, and R/2
numbers at a time are short ones.
"""

import torch
import torch.nn.functional as F

from minglm.kernels.norm.eager import normalize, normalize_backward, widen


def qk_norm_rope(q_BSNA, k_BSMA, q_weight_A, k_weight_A, cos, sin, eps):
    """Plain form: queries (B, S, N, A) and keys (B, S, M, A), normed and rotated, in their own dtype.

    weights (A,), or None for a model without QK-norm; cos and sin (B or 1, S, 1, R/2) float32, of
    `minglm.model.rope.angles`. Differentiable in all but the angles.
    """
    half, cos, sin = cos.shape[-1], cos.to(q_BSNA.dtype), sin.to(q_BSNA.dtype)

    def one(x, weight):
        if weight is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            x = F.rms_norm(x.to(wide), weight.shape, eps=eps).to(x.dtype) * weight.to(x.dtype)
        a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    return one(q_BSNA, q_weight_A), one(k_BSMA, k_weight_A)


def _turn(x_BSNA, cos, sin):
    """Rotation of float32 heads; by a negative `sin` the way back. Factors of whole heads make its rows long."""
    half, heads = cos.shape[-1], x_BSNA.shape[2]
    rest = cos.new_ones(*cos.shape[:-1], x_BSNA.shape[-1] - 2 * half)
    c_BSNA = torch.cat((cos, cos, rest), -1).expand(-1, -1, heads, -1).contiguous()
    s_BSNR = torch.cat((-sin, sin), -1).expand(-1, -1, heads, -1).contiguous()
    swapped = torch.cat((x_BSNA[..., half : 2 * half], x_BSNA[..., :half]), -1)
    y_BSNA = x_BSNA * c_BSNA
    y_BSNA[..., : 2 * half] += swapped.mul_(s_BSNR)
    return y_BSNA


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSNA, weight_A, cos, sin, eps):
        out_BSNA, scale = normalize(*widen(x_BSNA, weight_A), eps)
        ctx.save_for_backward(x_BSNA, weight_A, scale, cos, sin)
        return _turn(out_BSNA, cos, sin).to(x_BSNA.dtype)

    @staticmethod
    def backward(ctx, grad_BSNA):
        x_BSNA, weight_A, scale, cos, sin = ctx.saved_tensors
        grad, x, weight = widen(grad_BSNA, x_BSNA, weight_A)
        dx, dweight = normalize_backward(_turn(grad, cos, -sin), x, weight, scale)
        return dx.to(x_BSNA.dtype), dweight.to(weight_A.dtype), None, None, None


def norm_rope_by_hand(q_BSNA, k_BSMA, q_weight_A, k_weight_A, cos, sin, eps):
    """The same as `qk_norm_rope`, of a model with QK-norm; differentiable in all but the angles."""
    return tuple(
        _NormRope.apply(x, w, cos, sin, eps)
        for x, w in ((q_BSNA, q_weight_A), (k_BSMA, k_weight_A))
    )
