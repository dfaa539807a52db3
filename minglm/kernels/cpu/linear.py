"""Linear maps and the unit of an MLP in C, with their backward passes (paper 2.1).

    y = x W' + b;   dx = dy W;   dW = dy' x;   db = sum over rows of dy

References: `minglm.kernels.linear.eager` and `minglm.kernels.swiglu.eager`.
"""

from typing import Any

import torch

from minglm.kernels.cpu.build import address, loaded_library


def product_c(
    a_TK: torch.Tensor, b_KF: torch.Tensor, bias_F: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a b, plus the bias for each row: float32 (T, F) of float32 (T, K) and (K, F) with any strides."""
    T, K = a_TK.shape
    F = b_KF.shape[1]
    out_TF = a_TK.new_empty(T, F)
    loaded_library().product(
        address(a_TK, strided=True),
        *a_TK.stride(),
        address(b_KF, strided=True),
        *b_KF.stride(),
        address(bias_F),
        address(out_TF),
        T,
        F,
        K,
    )
    return out_TF


class _Linear(torch.autograd.Function):
    """A linear map of rows."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, weight_FD)
        return product_c(x_TD, weight_FD.T, bias_F)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_TF: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_FD = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            product_c(grad_TF, weight_FD) if for_x else None,
            product_c(grad_TF.T, x_TD) if for_weight else None,
            grad_TF.sum(0) if for_bias else None,
        )


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of contiguous numbers."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(gate)
        loaded_library().swiglu_forward(address(gate), address(up), address(out), out.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        dgate = torch.empty_like(gate)
        dup = torch.empty_like(up)
        loaded_library().swiglu_backward(
            address(gate),
            address(up),
            address(grad.contiguous()),
            address(dgate),
            address(dup),
            grad.numel(),
        )
        return dgate, dup


# The compiler cannot trace addresses of tensors.
_linear: Any = torch.compiler.disable(_Linear.apply)
_swiglu: Any = torch.compiler.disable(_SwiGLU.apply)


def linear_c(
    x: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute `linear` of `linear/eager.py`: x (..., D) to (..., F), all float32."""
    rows_TD = x.reshape(-1, x.shape[-1])
    return _linear(rows_TD, weight_FD, bias_F).view(*x.shape[:-1], len(weight_FD))


def swiglu_c(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute `swiglu` of `swiglu/eager.py`, all float32 and of one shape."""
    return _swiglu(gate.contiguous(), up.contiguous())
