"""RMSNorm with the addition to the residual stream before it: the function that the model calls (paper 2.1).

Every layer adds to the stream and norms it twice, and neither has any arithmetic to speak of: on a GPU the time is that
of moving r. One kernel reads x and change and writes r and out, where two would move r twice more. `eager.py` has the
equation and the reference. `minglm.kernels.dispatch` chooses the form.
"""

import torch

from minglm.kernels.dispatch import Operation, select


def add_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, change_TD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, r): r = x + change, or x without a change; out its RMSNorm. Both have x's shape and dtype.

    x and change (..., D); weight (D,) float32. Differentiable in x, change and weight.
    """
    return select(Operation.NORM, x_TD)(x_TD, weight_D, eps, change_TD)
