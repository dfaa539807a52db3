"""A linear map in plain PyTorch: the reference (no section in the paper).

y = x W' + b
"""

import torch
import torch.nn.functional as F


def linear(
    x: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None = None
) -> torch.Tensor:
    """Map x (..., D) to (..., F) by weight (F, D) and bias (F,)."""
    return F.linear(x, weight_FD, bias_F)
