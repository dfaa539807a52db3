"""The routed experts as grouped products: every expert multiplies the rows that were sent to it (paper 2.1).

`eager.py` has the equation and the reference. On a GPU it is the Triton kernels of `triton_layer.py`, which sort the
indices only. `minglm.kernels.dispatch` chooses the form.
"""

import torch

from minglm.kernels.dispatch import Operation, select
from minglm.kernels.experts.grouped import grouped_mm, grouped_outer

__all__ = ["grouped_experts", "grouped_mm", "grouped_outer"]


def grouped_experts(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Compute the layer: x (T, D), experts int64 (T, K), weights float32 (T, K) to y (T, D) in x's dtype.

    gate and up (E, F, D) and down (E, D, F) may be of another dtype: products are made in x's. Differentiable in all
    but the experts.
    """
    gate_EFD = gate_EFD.to(x_TD.dtype)
    up_EFD = up_EFD.to(x_TD.dtype)
    down_EDF = down_EDF.to(x_TD.dtype)
    size = gate_EFD[0].numel()
    compute = select(Operation.EXPERTS, x_TD, empty=len(x_TD) == 0, matrix_size=size)
    return compute(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF)
