"""Train on the engine's own log-probabilities: their values from the engine, their gradient from training (paper 3.5).

    log pi(y_t) = value of the engine's decoder for the weights in training        (`minglm.inference.scoring`)
    d log pi(y_t) / d weights = that of the training pass

On policy the value is what the engine recorded, bit for bit: the first ratio is exactly 1 and the first
divergence exactly 0, whatever the length of a prompt, the batch, the number of turns or the padding. In later
updates of a rollout ratios and clips are those of the policy as the engine would sample from it. The gradient
is that of the same function of the same weights; only its rounding is the training pass's, as it would be
anyway.

With routing replay the training pass takes the experts that the engine took, so value and gradient agree in these too.
"""

from typing import Any

import torch
from torch import Tensor


class _Values(torch.autograd.Function):
    """Return the values; pass the gradient on to what they stand for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        return grad, None


def with_values(x: Tensor, values: Tensor) -> Tensor:
    """Return `values` exactly, with the gradient of x.

    Both have one shape and dtype; values carry no gradient.
    """
    return _Values.apply(x, values)
