"""RMSNorm with its backward pass written out, for training on a CPU (paper 2.1).

    scale = 1 / sqrt(mean(r^2) + eps);   n = r * scale;   out = weight * n
    dr = scale * (dout * weight - n * mean(dout * weight * n));   dweight = sum over rows of dout * n

Automatic differentiation would write a tensor for every factor. `scale`, one number a row, is kept for the backward
pass. In bfloat16 it computes in float32 and rounds once, at the end. The Triton form (`triton_kernel.py`) has the same
equations.
"""

from typing import Any, NamedTuple

import torch


class Normalized(NamedTuple):
    """Rows after the norm, and the factor of each row."""

    out: torch.Tensor
    scale: torch.Tensor


def widen(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors in float32, or in their own dtype if that is wider."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Normalized:
    """Norm the last axis of x (..., D) by the weight (D,), both wide. `out` is (..., D), `scale` (..., 1), both wide."""
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return Normalized((x * scale).mul_(weight), scale)


def normalize_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x (..., D) and weight (D,). All arguments and results are wide.

    The mean is over dout * x * weight, and scale^3 stands for the two factors of n and the one outside: one pass less
    over whole rows.
    """
    product = grad * x
    mean = (product @ weight[:, None]).mul_(scale**3 / x.shape[-1])
    dweight = product.flatten(0, -2).T @ scale.flatten()
    dx = (grad * weight).mul_(scale).addcmul_(x, mean, value=-1)
    return dx, dweight


class _Norm(torch.autograd.Function):
    """RMSNorm in float32 whatever the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide_x, wide_weight = widen(x, weight)
        out, scale = normalize(wide_x, wide_weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out.to(x.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        wide_grad, wide_x, wide_weight = widen(grad, x, weight)
        dx, dweight = normalize_backward(wide_grad, wide_x, wide_weight, scale)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


def add_norm_fused(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, change_TD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `norm` of `eager.py`: (out, r), each of x's shape (..., D) and dtype; weight (D,) float32."""
    r_TD = x_TD if change_TD is None else x_TD + change_TD
    return _Norm.apply(r_TD, weight_D, eps), r_TD
