"""A linear map in plain PyTorch: the reference (no section in the paper).

y = x W' + b
"""

import torch
import torch.nn.functional as F


def linear(
    x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """Map x (..., I) to (..., O) by weight (O, I) and bias (O,)."""
    return F.linear(x, weight_OI, bias_O)
