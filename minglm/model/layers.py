"""The two building blocks every other component uses: a linear map and RMSNorm, and the SwiGLU MLP made of them.

    RMSNorm(x) = weight * x / sqrt(mean(x^2) + eps);   MLP(x) = down( silu(gate x) * up x )

Weights are kept in float32 and cast to the dtype of the activations where they are used, so the same model trains in
float32 or with bfloat16 matrix products by casting one tensor: the output of the embedding.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minglm.kernels.norm.eager import add_norm


class Linear(nn.Module):
    """y = x W' (+ b), W of shape (out, in). Values are set by `minglm.model.glm.initialize`."""

    def __init__(self, inputs, outputs, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        """(..., in) to (..., out), in x's dtype."""
        return F.linear(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; the mean is taken in float32 whatever the dtype of x."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x, change=None):
        """(..., width) to the same shape and dtype; with a `change`, the norm of x + change, and that sum."""
        normed, total = add_norm(x, self.weight, self.eps, change)
        return normed if change is None else (normed, total)


class MLP(nn.Module):
    """SwiGLU feed-forward network without biases: the dense layers and the shared expert."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x):
        """(..., D) to (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
