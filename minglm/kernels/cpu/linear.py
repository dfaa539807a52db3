"""Linear maps and the unit of an MLP in C, with their backward passes (paper 2.1).

    y = x W' + b;   dx = dy W;   dW = dy' x;   db = sum over rows of dy

References: `minglm.kernels.linear.eager` and `minglm.kernels.swiglu.eager`.
"""

from typing import Any

import torch

from minglm.kernels.cpu.build import address, loaded_library


def product_c(
    a_MK: torch.Tensor, b_KN: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a b, plus the bias for each row: float32 (M, N) of float32 (M, K) and (K, N) with any strides."""
    M, K = a_MK.shape
    N = b_KN.shape[1]
    out_MN = a_MK.new_empty(M, N)
    loaded_library().product(
        a_MK.data_ptr(),
        *a_MK.stride(),
        b_KN.data_ptr(),
        *b_KN.stride(),
        address(bias_N),
        address(out_MN),
        M,
        N,
        K,
    )
    return out_MN


class _Linear(torch.autograd.Function):
    """A linear map of rows."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        return product_c(x_TI, weight_OI.T, bias_O)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_TO: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            product_c(grad_TO, weight_OI) if for_x else None,
            product_c(grad_TO.T, x_TI) if for_weight else None,
            grad_TO.sum(0) if for_bias else None,
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
    x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute `linear` of `linear/eager.py`: x (..., I) to (..., O), all float32."""
    rows_TI = x.reshape(-1, x.shape[-1])
    return _linear(rows_TI, weight_OI, bias_O).view(*x.shape[:-1], len(weight_OI))


def swiglu_c(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute `swiglu` of `swiglu/eager.py`, all float32 and of one shape."""
    return _swiglu(gate.contiguous(), up.contiguous())
