"""The routed experts in C, with their backward pass (paper 2.1).

Equations: `minglm.kernels.experts.grouped`. Reference: `minglm.kernels.experts.eager`.
"""

from typing import Any

import torch

from minglm.kernels.cpu.build import address, lanes, loaded_library


class _Experts(torch.autograd.Function):
    """The layer. It keeps its arguments, gate x and up x of each pair, and the order of the pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        gate_EFD: torch.Tensor,
        up_EFD: torch.Tensor,
        down_EDF: torch.Tensor,
    ) -> torch.Tensor:
        E, F, D = gate_EFD.shape
        K = experts_TK.shape[1]
        pairs = experts_TK.numel()
        order = torch.empty(pairs, dtype=torch.int64)
        ends = torch.empty(E + 1, dtype=torch.int64)
        loaded_library().sort_pairs(address(experts_TK), address(order), address(ends), pairs, E)
        whole_F = -(-F // lanes()) * lanes()
        hidden = x_TD.new_empty(pairs, 2 * whole_F)
        y_TD = torch.zeros_like(x_TD)
        saved = (x_TD, order, ends, weights_TK, gate_EFD, up_EFD, down_EDF, hidden)
        ctx.sizes = (K, E, D, F)
        ctx.save_for_backward(*saved)
        loaded_library().experts_forward(*map(address, saved), address(y_TD), *ctx.sizes)
        return y_TD

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_TD: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        x_TD, _, _, weights_TK, gate_EFD, up_EFD, down_EDF, _ = saved
        dweights_TK = torch.empty_like(weights_TK)
        dx_TD, dgate_EFD, dup_EFD, ddown_EDF = map(
            torch.zeros_like, (x_TD, gate_EFD, up_EFD, down_EDF)
        )
        results = (dx_TD, dweights_TK, dgate_EFD, dup_EFD, ddown_EDF)
        arguments = (*saved, grad_TD.contiguous(), *results)
        loaded_library().experts_backward(*map(address, arguments), *ctx.sizes)
        return dx_TD, None, dweights_TK, dgate_EFD, dup_EFD, ddown_EDF


# The compiler cannot trace addresses of tensors.
_experts: Any = torch.compiler.disable(_Experts.apply)


def experts_c(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Compute `experts_loop` of `experts/eager.py`: x and y (T, D), experts int64 and weights (T, K), all else float32."""
    arguments = (x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF)
    return _experts(*[tensor.contiguous() for tensor in arguments])
