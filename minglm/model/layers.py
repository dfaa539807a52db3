"""The building blocks of every layer: a linear map, RMSNorm, and the SwiGLU MLP (paper 2.1).

    RMSNorm(x) = weight * x / sqrt(mean(x^2) + eps);   MLP(x) = down( silu(gate x) * up x )

Weights are kept in float32 and cast to the dtype of the activations where they are used, so the same model
trains in float32 or with bfloat16 matrix products by casting one tensor: the output of the embedding.
"""

from typing import overload

import torch
from torch import Tensor, nn

from minglm.kernels.linear import linear
from minglm.kernels.norm import add_norm
from minglm.kernels.swiglu import swiglu


class Linear(nn.Module):
    """y = x W' (+ b), W of shape (out, in). `minglm.model.glm.initialize` sets the values."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; the mean is taken in float32 whatever the dtype of x."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    @overload
    def forward(self, x: Tensor, change: None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, change: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, change: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Norm x (..., width), in the same shape and dtype; with a `change`, return the norm of x + change, and that sum."""
        normed, total = add_norm(x, self.weight, self.eps, change)
        return normed if change is None else (normed, total)


class MLP(nn.Module):
    """SwiGLU feed-forward network without biases: the dense layers and the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
