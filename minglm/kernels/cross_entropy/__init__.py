"""Output head and cross-entropy together, never holding the logits of the whole batch (no section in the paper).

`linear_cross_entropy` computes the gradients in the same walk over chunks as the loss. `token_log_probabilities` is for
losses whose gradient is not known beforehand: in bfloat16 it does not round the logits on a GPU, and computes them
twice. `eager.py` has the equation and the references. `minglm.kernels.dispatch` chooses the forms.
"""

import torch

from minglm.kernels.dispatch import Operation, select


def linear_cross_entropy(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor, weights_T: torch.Tensor
) -> torch.Tensor:
    """Return sum_t weight_t * cross-entropy_t, a float32 scalar.

    hidden (T, D) and head (V, D) of any float dtype; targets int64 (T,); weights (T,). Tokens of weight zero cost
    nothing: they are left out before the product. All weights zero gives exactly 0 with zero gradients, never NaN. The
    backward pass can run once (a second one may get autograd's error of a tensor modified in place).
    """
    (counted,) = weights_T.nonzero(as_tuple=True)
    if len(counted) < len(weights_T):
        hidden_TD = hidden_TD[counted]
        targets_T = targets_T[counted]
        weights_T = weights_T[counted]
    compute = select(Operation.CROSS_ENTROPY, hidden_TD)
    return compute(hidden_TD, head_VD, targets_T, weights_T.float())


def token_log_probabilities(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each target and the entropy of each distribution, (T,) and (T,) float32.

    hidden (T, D), head (V, D), targets int64 (T,). The logits are divided by the temperature. Differentiable by
    autograd; used by reinforcement learning, whose loss is not linear in the log-probability. The entropy carries no
    gradient.
    """
    compute = select(Operation.LOG_PROBABILITIES, hidden_TD, empty=len(hidden_TD) == 0)
    return compute(hidden_TD, head_VD, targets_T, temperature)
