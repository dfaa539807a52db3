"""The unit of every MLP in plain PyTorch: the reference (paper 2.1).

silu(gate) * up;   silu(g) = g / (1 + e^-g)
"""

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, all of one shape and dtype."""
    return F.silu(gate) * up
