"""RMSNorm after the addition to the residual stream, in plain PyTorch: the reference (paper 2.1: two norms a layer).

    r = x + change;   out = weight * r / sqrt(mean(r^2) + eps)

The mean is float32 whatever the dtype of x.
"""

import torch
import torch.nn.functional as F


def norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, change_TD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, r), each of x's shape and dtype; r is x without a change.

    x and change (..., D), of any float dtype; weight (D,) float32. Where x is not float32, r / sqrt(mean) is rounded to
    its dtype before the weight multiplies.
    """
    r_TD = x_TD if change_TD is None else x_TD + change_TD
    if r_TD.dtype == weight_D.dtype:
        return F.rms_norm(r_TD, weight_D.shape, weight_D, eps), r_TD
    normal_TD = F.rms_norm(r_TD.float(), weight_D.shape, eps=eps).to(r_TD.dtype)
    return normal_TD * weight_D.to(r_TD.dtype), r_TD
