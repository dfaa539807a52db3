"""The routed experts of a layer as a loop, in plain PyTorch: the reference (paper 2.1).

y_t = sum over the K experts e chosen for token t of  w_te * down_e( silu(gate_e x_t) * (up_e x_t) )
"""

import torch
import torch.nn.functional as F


def experts_loop(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Compute x (T, D), experts int (T, K), weights (T, K) float32 to y (T, D) in x's dtype; sums are float32.

    The matrices may be of another dtype, as a model's are that computes in bfloat16: products are made in x's.
    """
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for e in range(gate_EFD.shape[0]):
        token, slot = (experts_TK == e).nonzero(as_tuple=True)
        x = x_TD[token]
        gate_FD = gate_EFD[e].to(x.dtype)
        up_FD = up_EFD[e].to(x.dtype)
        down_DF = down_EDF[e].to(x.dtype)
        out = (F.silu(x @ gate_FD.T) * (x @ up_FD.T)) @ down_DF.T
        y_TD = y_TD.index_add(0, token, out.float() * weights_TK[token, slot, None])
    return y_TD.to(x_TD.dtype)
