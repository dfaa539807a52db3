"""A linear map: the function behind every projection of the model (no section in the paper).

Large products are the business of the library behind PyTorch. Those of a small model on a CPU are not: see
`minglm/kernels/cpu/product.c`. `eager.py` has the reference. `minglm.kernels.dispatch` chooses the form.
"""

import torch

from minglm.kernels.dispatch import Operation, select


def linear(
    x: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x W' + b: x (..., D), weight (F, D) and bias (F,) of one dtype to (..., F). Differentiable in all three."""
    compute = select(Operation.LINEAR, x, matrix_size=weight_FD.numel())
    return compute(x, weight_FD, bias_F)
