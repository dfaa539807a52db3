"""RMSNorm, and QK-norm with rotation, in C, with their backward passes (paper 2.1).

Equations: `minglm.kernels.norm.fused` and `minglm.kernels.qk_norm_rope.fused`. References: the `eager.py` beside them.
"""

from typing import Any

import torch

from minglm.kernels.cpu.build import address, loaded_library


class _AddNorm(torch.autograd.Function):
    """(norm(r), r) with r = x + change. The gradients of x and change are one tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_D: torch.Tensor,
        eps: float,
        change_TD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_TD = torch.empty_like(x_TD)
        r_TD = torch.empty_like(x_TD)
        _forward(ctx, x_TD, change_TD, weight_D, r_TD, out_TD, eps)
        return out_TD, r_TD

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_TD: torch.Tensor, dr_TD: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        dx_TD, dweight_D = _backward(ctx, grad_TD, dr_TD.contiguous())
        return dx_TD, dweight_D, None, dx_TD


class _Norm(torch.autograd.Function):
    """norm(x)."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        out_TD = torch.empty_like(x_TD)
        _forward(ctx, x_TD, None, weight_D, x_TD, out_TD, eps)
        return out_TD

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_TD: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return *_backward(ctx, grad_TD, None), None


def _forward(
    ctx: Any,
    x_TD: torch.Tensor,
    change_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    r_TD: torch.Tensor,
    out_TD: torch.Tensor,
    eps: float,
) -> None:
    D = len(weight_D)
    rows = x_TD.numel() // D
    scale_T = x_TD.new_empty(rows)
    tensors = (x_TD, change_TD, weight_D, r_TD, out_TD, scale_T)
    loaded_library().norm_forward(*map(address, tensors), rows, D, eps)
    ctx.save_for_backward(r_TD, weight_D, scale_T)


def _backward(
    ctx: Any, grad_TD: torch.Tensor, dr_TD: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    r_TD, weight_D, scale_T = ctx.saved_tensors
    dx_TD = torch.empty_like(r_TD)
    dweight_D = torch.zeros_like(weight_D)
    tensors = (grad_TD.contiguous(), dr_TD, r_TD, weight_D, scale_T, dx_TD, dweight_D)
    loaded_library().norm_backward(*map(address, tensors), len(scale_T), len(weight_D))
    return dx_TD, dweight_D


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
        B, S, N, A = x_BSNA.shape
        out_BSNA = torch.empty_like(x_BSNA)
        scale_BSN = x_BSNA.new_empty(B, S, N)
        ctx.sizes = (B * S, cos.shape[0] * S, N, A, cos.shape[-1])
        ctx.save_for_backward(x_BSNA, weight_A, cos, sin, scale_BSN)
        tensors = (x_BSNA, weight_A, cos, sin, out_BSNA, scale_BSN)
        loaded_library().rotate_forward(*map(address, tensors), *ctx.sizes, eps)
        return out_BSNA

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_BSNA: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        dx_BSNA = torch.empty_like(saved[0])
        dweight_A = torch.zeros_like(saved[1])
        tensors = (grad_BSNA.contiguous(), *saved, dx_BSNA, dweight_A)
        loaded_library().rotate_backward(*map(address, tensors), *ctx.sizes)
        return dx_BSNA, dweight_A, None, None, None


# The compiler cannot trace addresses of tensors.
_norm: Any = torch.compiler.disable(_Norm.apply)
_add_norm: Any = torch.compiler.disable(_AddNorm.apply)
_norm_rope: Any = torch.compiler.disable(_NormRope.apply)


def add_norm_c(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, change_TD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `norm` of `norm/eager.py`: (out, r), each of x's shape (..., D); all float32."""
    x_TD = x_TD.contiguous()
    if change_TD is None:
        return _norm(x_TD, weight_D, eps), x_TD
    return _add_norm(x_TD, weight_D, eps, change_TD.contiguous())


def qk_norm_rope_c(
    q_BSNA: torch.Tensor,
    k_BSMA: torch.Tensor,
    q_weight_A: torch.Tensor,
    k_weight_A: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and rotate queries (B, S, N, A) and keys (B, S, M, A) of a model with QK-norm; shapes stay, all float32.

    Weights (A,); cos and sin (B or 1, S, 1, R/2).
    """
    angles = (cos.contiguous(), sin.contiguous(), eps)
    q_BSNA = _norm_rope(q_BSNA.contiguous(), q_weight_A, *angles)
    k_BSMA = _norm_rope(k_BSMA.contiguous(), k_weight_A, *angles)
    return q_BSNA, k_BSMA
