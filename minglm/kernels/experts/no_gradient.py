"""The expert layer without a backward pass, for scoring and generation on a CPU without C (paper 2.1).

    y_t = sum over the K experts e chosen for token t of  down_e( w_te * silu(gate_e x_t) * (up_e x_t) )

Nothing is kept, and small products are not sorted at all. For few tokens and small experts all experts see all tokens,
and the weights of those not chosen are zero: three products in place of three for each expert, whose calls would cost
more than the arithmetic.
"""

import torch
import torch.nn.functional as F

MAX_UNSORTED_FLOPS = 2**23
"""Multiplications of one matrix by all tokens, below which sorting them by expert does not pay."""


def experts_without_gradient(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Compute `experts_loop` of `eager.py`: x and y (T, D), experts int64 and weights float32 (T, K), all else x's dtype."""
    inputs = (x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF)
    E, F_, D = gate_EFD.shape
    if len(x_TD) * E * F_ * D <= MAX_UNSORTED_FLOPS:
        return _all_by_all(*inputs)
    return _sorted_by_expert(*inputs)


def _all_by_all(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    T = len(x_TD)
    E, F_, D = gate_EFD.shape
    weights_TE = torch.zeros(T, E, dtype=weights_TK.dtype, device=x_TD.device)
    weights_TE = weights_TE.scatter_(1, experts_TK, weights_TK)
    h = F.silu(x_TD @ gate_EFD.view(-1, D).T).mul_(x_TD @ up_EFD.view(-1, D).T)
    h = h.view(T, E, F_).mul_(weights_TE[..., None])
    return torch.bmm(h.transpose(0, 1), down_EDF.mT).sum(0)


def _sorted_by_expert(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    T, K = experts_TK.shape
    E, _, D = gate_EFD.shape
    flat = experts_TK.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=E).tolist()

    def product(x: torch.Tensor, w_EDF: torch.Tensor) -> torch.Tensor:
        """Multiply the rows of each expert by its matrix."""
        products = []
        for rows, w in zip(x.split(counts), w_EDF, strict=True):
            if len(rows):
                products.append(torch.mm(rows, w))
        return torch.cat(products)

    x = x_TD[order // K]
    h = F.silu(product(x, gate_EFD.mT)).mul_(product(x, up_EFD.mT))
    h = h.mul_(weights_TK.flatten()[order, None])
    y = torch.empty(T * K, D, dtype=x_TD.dtype)
    y = y.index_copy_(0, order, product(h, down_EDF.mT))
    return y.view(T, K, D).sum(1)
