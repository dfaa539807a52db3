"""A linear map: the function behind every projection of the model (no section in the paper).

Large products are the business of the library behind PyTorch. Those of a small model on a CPU are not: see
`minglm/kernels/cpu/product.c`. `eager.py` has the reference. `minglm.kernels.dispatch` chooses the form.
"""

import torch

from minglm.kernels.dispatch import Operation, select


def linear(
    x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x W' + b: x (..., I), weight (O, I) and bias (O,) of one dtype to (..., O). Differentiable in all three."""
    compute = select(Operation.LINEAR, x, matrix_size=weight_OI.numel())
    return compute(x, weight_OI, bias_O)
